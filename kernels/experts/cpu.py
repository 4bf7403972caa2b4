"""A mixture of experts on the CPU: the experts in use one after the other, each with all of its tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from rowint8.kernels import cpu, cpu_int8
from rowint8.kernels.experts.checks import Experts


def experts(tokens: Tensor, *given: Any) -> Tensor:
    """[M, H] -> [M, H]; see `ops.experts`. Sums in fp32, experts in ascending order."""
    layer = Experts(*given)
    ids = _here(layer)
    out = torch.zeros(tokens.shape, dtype=torch.float32)
    for expert in ids[ids >= 0].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        biases = [None if bias is None else bias[expert] for bias in (layer.gate_up_bias, layer.down_bias)]
        rows = cpu.linear(tokens[token], layer.gate_up[expert], layer.gate_up_scale[expert], biases[0])
        hidden = activated(rows, layer.activation, layer.alpha, layer.limit)
        result = cpu.linear(hidden, layer.down[expert], layer.down_scale[expert], biases[1])
        out.index_add_(0, token, result * layer.weights[token, slot, None].float())
    return out.to(tokens.dtype)


def experts_int8(tokens: Tensor, *given: Any) -> Tensor:
    """[M, H] -> [M, H]; see `ops.experts_int8`. A token's experts are added in its order."""
    layer, (block, hidden_block) = Experts(*given[:6], expert_map=given[6]), given[7:]
    ids = _here(layer)
    parts = torch.zeros(*ids.shape, tokens.shape[1], dtype=torch.float32)
    for expert in ids[ids >= 0].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rounded = cpu_int8.quantize_tokens(tokens[token], block)
        hidden = cpu_int8.swiglu(*rounded, layer.gate_up[expert], layer.gate_up_scale[expert], tokens.dtype)
        hidden, scale = cpu_int8.quantize_tokens(hidden, hidden_block)
        down = layer.down[expert], layer.down_scale[expert], None
        result = cpu_int8.linear(hidden, scale * layer.weights[token, slot].float(), *down, tokens.dtype)
        parts[token, slot] = result.float()
    return parts.sum(1).to(tokens.dtype)


def _here(layer: Experts) -> Tensor:
    """ids [M, k] as this machine numbers its experts; -1 for those that are left out."""
    ids = layer.ids
    return ids if layer.expert_map is None else torch.where(ids >= 0, layer.expert_map[ids.clamp(min=0).long()], -1)


def activated(gate_up: Tensor, activation: str, alpha: float, limit: float | None) -> Tensor:
    """[..., 2I] -> [..., I]: the activation of `ops.experts`, in the dtype given."""
    oai = activation == "swigluoai"
    gate, up = (gate_up[..., 0::2], gate_up[..., 1::2]) if oai else gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1) if oai else silu(gate) * up
