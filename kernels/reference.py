"""What the operators compute, in plain torch and in whatever dtype the inputs are widened to. Tests widen to fp64.

Weights of products are an `Int8Weight` of shape [N, K]; activations have any leading dimensions [..., K].
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from rowint8.kernels.quantize import Int8Weight


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """(x @ values^T) * scale + bias: [..., K] -> [..., N] in `dtype`. The scale is applied after the product."""
    out = (x.to(dtype) @ weight.values.to(dtype).T) * weight.scale.to(dtype)
    return out if bias is None else out + bias.to(dtype)


def swiglu(x: Tensor, weight: Int8Weight, dtype: torch.dtype = torch.float64) -> Tensor:
    """silu(x @ gate^T) * (x @ up^T): [..., K] -> [..., I] in `dtype`; the weight [2I, K] stacks gate over up.

    SwiGLU as in Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202).
    """
    gate, up = linear(x, weight, dtype=dtype).chunk(2, dim=-1)
    return silu(gate) * up


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(total / sqrt(mean(total^2) + eps) * weight, total), total = x + residual: [..., H] in `dtype`, never rounded.

    RMSNorm as in Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
    """
    total = x.to(dtype) + residual.to(dtype)
    mean_square = total.square().mean(-1, keepdim=True)
    return total * torch.rsqrt(mean_square + eps) * weight.to(dtype), total
