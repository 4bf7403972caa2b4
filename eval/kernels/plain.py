"""The operators in plain torch, which eager mode and torch.compile are timed with."""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import silu

EPS = 1e-5


def linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`ops.linear` in plain torch: [M, K] -> [M, N] in x's dtype; values int8 [N, K], scale fp16 [N]."""
    return dense_linear(x, values.to(x.dtype)) * scale.to(x.dtype)


def swiglu(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`ops.swiglu` in plain torch: [M, K] -> [M, I] in x's dtype; values int8 [2I, K], scale fp16 [2I]."""
    return silu_and_mul(linear(x, values, scale))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[M, 2I] -> [M, I]; in eager mode two of torch's kernels."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm` as Hugging Face's `LlamaRMSNorm` computes it: (normed, total), both [M, H] in x's dtype."""
    total = x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype), total
