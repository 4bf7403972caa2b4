"""The operators of INT8 activations on the CPU, over oneDNN's INT8 product.

The bits are those of `activations`, whatever the number of tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from rowint8.kernels import cpu
from rowint8.kernels.activations import quantize_tokens

__all__ = ["add_rms_norm", "linear", "quantize_tokens", "swiglu"]

_product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]


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
    return _scaled(tokens, token_scale, values, scale, bias).to(dtype)


def swiglu(tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, K] -> [M, I]; see `ops.swiglu_int8`."""
    gate, up = _scaled(tokens, token_scale, values, scale, None).chunk(2, dim=-1)
    return (silu(gate) * up).to(dtype)


def _scaled(tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 [M, N]."""
    columns = values.T if values.shape[1] > 1 else values.view(values.shape[::-1])  # strides (1, 1) are misread
    by_row = _product(tokens, columns).float() * scale
    if bias is None:
        return token_scale[:, None] * by_row
    # fp64 holds the product of two fp32 numbers exactly, so this is one fused multiply-add but for ties of fp64
    return (token_scale.double()[:, None] * by_row + bias).float()
