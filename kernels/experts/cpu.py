"""A mixture of experts on the CPU: the experts in use one after the other, each with all of its tokens."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from rowint8.kernels import cpu, cpu_int8


def experts(
    tokens: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """[M, H] -> [M, H]; see `ops.experts`. Sums in fp32, experts in ascending order."""
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map[ids.clamp(min=0).long()], -1)
    out = torch.zeros(tokens.shape, dtype=torch.float32)
    for expert in ids[ids >= 0].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        biases = [None if bias is None else bias[expert] for bias in (gate_up_bias, down_bias)]
        rows = cpu.linear(tokens[token], gate_up[expert], gate_up_scale[expert], biases[0])
        hidden = activated(rows, activation, alpha, limit)
        result = cpu.linear(hidden, down[expert], down_scale[expert], biases[1])
        out.index_add_(0, token, result * weights[token, slot, None].float())
    return out.to(tokens.dtype)


def experts_int8(
    tokens: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_map: Tensor | None,
    block: int,
    hidden_block: int,
) -> Tensor:
    """[M, H] -> [M, H]; see `ops.experts_int8`. A token's experts are added in its order."""
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map[ids.clamp(min=0).long()], -1)
    parts = torch.zeros(*ids.shape, tokens.shape[1], dtype=torch.float32)
    for expert in ids[ids >= 0].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rounded = cpu_int8.quantize_tokens(tokens[token], block)
        hidden = cpu_int8.swiglu(*rounded, gate_up[expert], gate_up_scale[expert], tokens.dtype)
        hidden, scale = cpu_int8.quantize_tokens(hidden, hidden_block)
        scale = scale * weights[token, slot].float()
        parts[token, slot] = cpu_int8.linear(
            hidden, scale, down[expert], down_scale[expert], None, tokens.dtype
        ).float()
    return parts.sum(1).to(tokens.dtype)


def activated(gate_up: Tensor, activation: str, alpha: float, limit: float | None) -> Tensor:
    """[..., 2I] -> [..., I]: the activation of `ops.experts`, in the dtype given."""
    oai = activation == "swigluoai"
    gate, up = (gate_up[..., 0::2], gate_up[..., 1::2]) if oai else gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1) if oai else silu(gate) * up
