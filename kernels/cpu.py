"""The operators on the CPU, over ATen. How a product runs depends on the number of tokens M and the activation dtype.

- Few tokens in bf16 or fp16: ATen's int8-packed product, which reads the weight as INT8. It takes its scales in the
  activation dtype. fp16 scales go in as they are; bf16 would cut the scale to 8 bits for a whole row at once, so for
  bf16 the kernel runs with unit scales and the exact scale follows in fp32. It has no tail loop over K (odd K crashes
  the process), so K must be a multiple of its widest vector.
- Otherwise (many tokens, or fp32, where that kernel is not vectorised): the weight is widened once and multiplied by
  the BLAS, block by block so that the widened copy stays small. To fp32, or to bf16, which holds every INT8 value, with
  bf16 activations on a CPU that has instructions for them: 3 to 5 times as fast with 32 tokens and more.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

FEW_TOKENS = 16
"""Up to this many tokens the int8-packed product is taken; beyond it, widening once pays."""

_packed = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]
_PACKED_K = 32
_WIDEN_ELEMENTS = 1 << 24
_SCALE_ELEMENTS = 1 << 19
"""Few enough for scaled numbers to stay in the cache: the memory of all of them took longer to get than the product."""


def linear(tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, K] -> [M, N]; see `ops.linear`."""
    product = _int8_packed if _packed_applies(tokens, values) else _widened
    return product(tokens, values, scale, bias)


def swiglu(tokens: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """[M, K] -> [M, I]; see `ops.swiglu`."""
    gate, up = linear(tokens, values, scale).chunk(2, dim=-1)
    return silu(gate) * up


def add_rms_norm(tokens: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[M, H]; see `ops.add_rms_norm`."""
    total = tokens + residual
    return rms_norm(total, weight.shape, eps=eps) * weight, total


def _packed_applies(tokens: Tensor, values: Tensor) -> bool:
    few = 0 < tokens.shape[0] <= FEW_TOKENS
    return few and tokens.dtype != torch.float32 and values.numel() > 0 and values.shape[1] % _PACKED_K == 0


def _int8_packed(tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if tokens.dtype == torch.float16:
        out = _packed(tokens, values, scale)
        return out if bias is None else (out + bias).to(tokens.dtype)
    out = _packed(tokens, values, _ones(len(values), tokens.dtype))
    # bf16 * fp16 is computed in fp32
    return torch.mul(out, scale, out=out) if bias is None else (out * scale + bias).to(tokens.dtype)


@cache
def _ones(size: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(size, dtype=dtype, device="cpu")


def _widened(tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    wide = tokens if tokens.dtype == torch.bfloat16 and multiplies_bf16() else tokens.float()
    blocks = values.split(max(1, _WIDEN_ELEMENTS // max(1, values.shape[1])))
    parts = [wide @ block.to(wide.dtype).T for block in blocks]
    out = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    for rows in out.split(max(1, _SCALE_ELEMENTS // max(1, len(values)))):  # in fp32
        rows.copy_(rows * scale if bias is None else rows * scale + bias)
    return out.to(tokens.dtype)


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 numbers, so far as torch says."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
