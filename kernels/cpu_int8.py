"""The operators of INT8 activations on the CPU: oneDNN's INT8 product between two functions in C (`cpu_int8.c`).

The bits are those of `activations`, whatever the number of tokens. Without a C compiler plain torch does the same.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from rowint8.kernels import activations, cpu
from rowint8.kernels.cpu_build import library

_PER_THREAD = 1 << 14
"""Elements below which a second thread takes longer to start than it saves."""
_PLAIN = (torch.float32, torch.bfloat16)
"""Dtypes that the C functions read and write; fp16 is converted."""
_product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]


def quantize_tokens(tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Contiguous [M, K]; see `ops.quantize_tokens`."""
    if (built := library()) is None:
        return activations.quantize_tokens(tokens, block)
    tokens = tokens if tokens.dtype in _PLAIN else tokens.float()
    (m, k), threads = tokens.shape, _threads(tokens.numel())
    q, scale = tokens.new_empty(m, k, dtype=torch.int8), tokens.new_empty(m, dtype=torch.float32)
    room = tokens.new_empty(threads, k, dtype=torch.float32)
    given = (*_typed(tokens), m, k, block, activations.LEAST_ABSMAX, activations.scale_factor(block))
    built.quantize_tokens(*given, room.data_ptr(), q.data_ptr(), scale.data_ptr(), threads)
    return q, scale


def add_rms_norm(
    tokens: Tensor, residual: Tensor, weight: Tensor, eps: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[M, H]; see `ops.add_rms_norm_int8`."""
    normed, total = cpu.add_rms_norm(tokens, residual, weight, eps)
    return *quantize_tokens(normed, block), total


def linear(
    tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[M, K] -> [M, N]; see `ops.linear_int8`."""
    sums = _sums(tokens, values)
    if (built := library()) is None:
        return _scaled(sums, token_scale, scale, bias).to(dtype)
    out = sums.new_empty(sums.shape, dtype=dtype if dtype in _PLAIN else torch.float32)
    scale, wide = scale.contiguous(), None if bias is None else bias.float().contiguous()
    given = (sums.data_ptr(), token_scale.data_ptr(), scale.data_ptr(), None if wide is None else wide.data_ptr())
    built.scale_sums(*given, *sums.shape, *_typed(out), _threads(sums.numel()))
    return out.to(dtype)


def swiglu(tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, K] -> [M, I]; see `ops.swiglu_int8`."""
    sums = _sums(tokens, values)
    if (built := library()) is None:
        gate, up = _scaled(sums, token_scale, scale, None).chunk(2, dim=-1)
        return (silu(gate) * up).to(dtype)
    scale, m, width = scale.contiguous(), len(sums), sums.shape[1] // 2
    out = sums.new_empty(m, width, dtype=dtype if dtype in _PLAIN else torch.float32)
    given = (sums.data_ptr(), token_scale.data_ptr(), scale.data_ptr(), m, width)
    built.swiglu_sums(*given, *_typed(out), _threads(sums.numel()))
    return out.to(dtype)


def _sums(tokens: Tensor, values: Tensor) -> Tensor:
    """int32 [M, N], exact."""
    columns = values.T if values.shape[1] > 1 else values.view(values.shape[::-1])  # strides (1, 1) are misread
    return _product(tokens, columns)


def _scaled(sums: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 [M, N]."""
    by_row = sums.float() * scale
    if bias is None:
        return token_scale[:, None] * by_row
    # fp64 holds the product of two fp32 numbers exactly, so this is one fused multiply-add but for ties of fp64
    return (token_scale.double()[:, None] * by_row + bias).float()


def _typed(tensor: Tensor) -> tuple[int, int]:
    """Address, and whether bf16."""
    return tensor.data_ptr(), int(tensor.dtype == torch.bfloat16)


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _PER_THREAD))
