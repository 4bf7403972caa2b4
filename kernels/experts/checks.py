"""Whether the arguments of `ops.experts` fit together."""

import torch
from torch import Tensor

from rowint8.kernels.checks import check_dtype, check_tokens

ACTIVATIONS = ("silu", "swigluoai")


def check_experts(
    x: Tensor,
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
) -> None:
    """Raises ValueError, in one line, unless they do."""
    check_dtype(x.dtype)
    _check_weight("gate_up", gate_up, gate_up_scale, gate_up_bias)
    _check_weight("down", down, down_scale, down_bias)
    (experts, rows, hidden), (E, H, I) = gate_up.shape, down.shape
    if (experts, rows, hidden) != (E, 2 * I, H):
        raise ValueError(
            f"rowint8: gate_up {list(gate_up.shape)} and down {list(down.shape)} must be [E, 2I, H] and [E, H, I]"
        )
    if x.dim() == 0 or x.shape[-1] != H:
        raise ValueError(f"rowint8: activations {list(x.shape)} do not match experts of H = {H} inputs")
    _check_routing(x, weights, ids, expert_map)
    if activation not in ACTIVATIONS:
        raise ValueError(f"rowint8: activation is {activation!r}; accepted are {' and '.join(ACTIVATIONS)}")
    tensors = gate_up, gate_up_scale, down, down_scale, weights, ids, gate_up_bias, down_bias, expert_map
    if any(t is not None and t.device != x.device for t in tensors):
        raise ValueError(f"rowint8: activations are on {x.device}; experts and routing must be there too")


def check_experts_int8(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_map: Tensor | None,
    block: int,
    hidden_block: int,
) -> None:
    """Raises ValueError, in one line, unless they do."""
    check_experts(x, gate_up, gate_up_scale, down, down_scale, weights, ids, expert_map=expert_map)
    check_tokens(x, block)
    check_tokens(x.new_empty(0, down.shape[2]), hidden_block)


def _check_weight(name: str, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if values.dtype != torch.int8 or values.dim() != 3 or not values.is_contiguous() or not values.numel():
        given = f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"rowint8: {name} must be a contiguous int8 tensor [E, N, K], none of them 0, got {given}")
    for kind, part, dtype in (("scale", scale, torch.float16), ("bias", bias, None)):
        if part is not None and (part.shape != values.shape[:2] or part.dtype != (dtype or part.dtype)):
            wanted = f"{'float16 ' if dtype else ''}{list(values.shape[:2])}"
            raise ValueError(f"rowint8: {name}'s {kind} must be {wanted}, got {part.dtype} {list(part.shape)}")
        if part is not None and not part.is_contiguous():
            raise ValueError(f"rowint8: {name}'s {kind} must be contiguous")


def _check_routing(x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None) -> None:
    if ids.dtype not in (torch.int32, torch.int64) or ids.shape[:-1] != x.shape[:-1] or not ids.shape[-1:].numel():
        wanted = f"int32 or int64 {[*x.shape[:-1], 'k']}"
        raise ValueError(f"rowint8: ids must be {wanted}, k at least 1, got {ids.dtype} {list(ids.shape)}")
    if weights.shape != ids.shape or not weights.is_floating_point():
        given = f"{weights.dtype} {list(weights.shape)}"
        raise ValueError(f"rowint8: weights must be floating {list(ids.shape)} as the ids are, got {given}")
    if expert_map is not None and (expert_map.dim() != 1 or expert_map.dtype not in (torch.int32, torch.int64)):
        given = f"{expert_map.dtype} {list(expert_map.shape)}"
        raise ValueError(f"rowint8: expert_map must be int32 or int64, a number for each expert, got {given}")
