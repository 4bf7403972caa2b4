"""The arguments of `ops.experts`, and whether they fit together."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.kernels.checks import check_dtype, check_tokens

ACTIVATIONS = ("silu", "swigluoai")


class Experts(NamedTuple):
    """The arguments of `ops.experts` behind the activations."""

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    weights: Tensor
    ids: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    expert_map: Tensor | None = None
    activation: str = "silu"
    alpha: float = 1.702
    limit: float | None = None


def check_experts(x: Tensor, *given: Any) -> None:
    """Raises ValueError, in one line, unless they do. `given` are fields of `Experts`."""
    layer = Experts(*given)
    check_dtype(x.dtype)
    _check_weight("gate_up", layer.gate_up, layer.gate_up_scale, layer.gate_up_bias)
    _check_weight("down", layer.down, layer.down_scale, layer.down_bias)
    (experts, rows, hidden), (E, H, I) = layer.gate_up.shape, layer.down.shape
    if (experts, rows, hidden) != (E, 2 * I, H):
        sizes = f"gate_up {list(layer.gate_up.shape)} and down {list(layer.down.shape)}"
        raise ValueError(f"rowint8: {sizes} must be [E, 2I, H] and [E, H, I]")
    if x.dim() == 0 or x.shape[-1] != H:
        raise ValueError(f"rowint8: activations {list(x.shape)} do not match experts of H = {H} inputs")
    _check_routing(x, layer.weights, layer.ids, layer.expert_map)
    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"rowint8: activation is {layer.activation!r}; accepted are {' and '.join(ACTIVATIONS)}")
    if any(isinstance(t, Tensor) and t.device != x.device for t in layer):
        raise ValueError(f"rowint8: activations are on {x.device}; experts and routing must be there too")


def check_experts_int8(x: Tensor, *given: Any) -> None:
    """The same for the arguments of `ops.experts_int8`."""
    *layer, expert_map, block, hidden_block = given
    check_experts(x, *layer, None, None, expert_map)
    check_tokens(x, block)
    check_tokens(x.new_empty(0, layer[2].shape[2]), hidden_block)


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
