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


def int8_sums(tokens: Tensor, values: Tensor) -> Tensor:
    """tokens @ values^T of int8 [..., K] and int8 [N, K]: the exact int64 [..., N].

    fp64 holds every whole number up to 2^53, and unlike int64 it has products on every device.
    """
    return (tokens.double() @ values.double().T).long()


def linear_int8(
    tokens: Tensor, token_scale: Tensor, weight: Int8Weight, bias: Tensor | None = None, dtype=torch.float64
) -> Tensor:
    """token_scale * scale * (tokens @ values^T) + bias: int8 [..., K], fp32 [...] -> [..., N] in `dtype`."""
    sums = int8_sums(tokens, weight.values).to(dtype)
    out = token_scale.to(dtype)[..., None] * (weight.scale.to(dtype) * sums)
    return out if bias is None else out + bias.to(dtype)


def swiglu_int8(tokens: Tensor, token_scale: Tensor, weight: Int8Weight, dtype=torch.float64) -> Tensor:
    """`swiglu` over INT8 activations: int8 [..., K], fp32 [...] -> [..., I] in `dtype`."""
    gate, up = linear_int8(tokens, token_scale, weight, dtype=dtype).chunk(2, dim=-1)
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


def experts(
    x: Tensor,
    gate_up: Int8Weight,
    down: Int8Weight,
    weights: Tensor,
    ids: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """sum_k weights[m, k] * expert(ids[m, k])(x[m]): [M, H] -> [M, H] in `dtype`, pair by pair; see `ops.experts`.

    Mixtures of experts as in Shazeer et al., "Outrageously Large Neural Networks" (arXiv:1701.06538).
    """
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for token, slot in torch.cartesian_prod(*(torch.arange(size) for size in ids.shape)).tolist():
        expert = int(ids[token, slot]) if expert_map is None else int(expert_map[ids[token, slot]])
        if expert < 0:
            continue
        first, second = (Int8Weight(weight.values[expert], weight.scale[expert]) for weight in (gate_up, down))
        biases = [None if bias is None else bias[expert] for bias in (gate_up_bias, down_bias)]
        hidden = activated(linear(x[token], first, biases[0], dtype), activation, alpha, limit)
        out[token] += weights[token, slot].to(dtype) * linear(hidden, second, biases[1], dtype)
    return out


def activated(gate_up: Tensor, activation: str = "silu", alpha: float = 1.702, limit: float | None = None) -> Tensor:
    """[..., 2I] -> [..., I]: the activation between the products of `experts`."""
    interleaved = activation == "swigluoai"
    gate, up = (gate_up[..., 0::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1) if interleaved else silu(gate) * up
