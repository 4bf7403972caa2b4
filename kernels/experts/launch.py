"""Launches the kernels of a mixture of experts."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from rowint8.kernels.experts import products
from rowint8.kernels.experts.checks import Experts
from rowint8.kernels.experts.hopper import Rotation, hopper_parts, hopper_serves
from rowint8.kernels.experts.routing import Routing, route
from rowint8.kernels.experts.tiles import ExpertsTile, pick_tile
from rowint8.kernels.launch import blocks, dependent_launch, launch, traits
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.types import HopperTile, TritonTile

_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SUM_BLOCK = 1024


class _Call(NamedTuple):
    """What all launches of a call share."""

    device: torch.device
    dtype: torch.dtype
    topk: int
    experts: int
    has_map: bool
    activation: tuple


def experts(
    x: Tensor,
    *given: Any,
    tile: ExpertsTile | HopperTile | None = None,
    rotation: Rotation | None = None,
    out: Tensor | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`ops.experts` for contiguous [M, H] activations, [M, k] weights and ids, already checked there.

    Args:
        tile: the one to run with, instead of the one that `pick_tile` returns.
        rotation: of the weights' columns, where tokens are rounded to INT8; then the tile is one for INT8 tokens.
        out: where the result goes, contiguous [M, H] in x's dtype; None makes it.
        scratch: two contiguous tensors in x's dtype of at least M * k * max(H, I) elements, for what is between; `out`
            may lie in the first. None makes it.
    """
    layer = Experts(*given)
    (M, H), topk, E = x.shape, layer.ids.shape[1], len(layer.down)
    out = torch.empty(M, H, dtype=x.dtype, device=x.device) if out is None else out
    if not M:
        return out
    all_experts = E if layer.expert_map is None else len(layer.expert_map)
    by_tma = hopper_serves(x, layer.gate_up, layer.down, layer.activation, layer.limit, layer.gate_up_bias is not None)
    itemsize = 1 if rotation else x.element_size()
    tile = tile or pick_tile(M, topk, all_experts, itemsize, card_of(x.device), by_tma)
    oai = layer.activation == "swigluoai"
    activation = oai, layer.alpha if oai else 1.0, layer.limit  # "silu" has no alpha to compile for
    call = _Call(x.device, x.dtype, topk, E, layer.expert_map is not None, activation)
    if isinstance(tile, HopperTile):
        weights = (layer.gate_up, layer.gate_up_scale), (layer.down, layer.down_scale)
        parts, places = hopper_parts(x, *weights, layer.weights, layer.ids, layer.expert_map, tile, rotation)
        _sum(parts, layer, call, out, places)
    elif tile.block_m == 1:
        _pairs(x, layer, tile, call, scratch and scratch[1], out)
    else:
        routing = route(layer.ids, layer.expert_map, E, tile.block_m)
        first, second = scratch or (None, None)
        hidden = _grouped(x, layer, tile, call, routing, first, fused=True)
        parts = _grouped(hidden, layer, tile, call, routing, second, fused=False)
        _sum(parts, layer, call, out)
    return out


def _rows(count: int, columns: int, like: Tensor, scratch: Tensor | None) -> Tensor:
    """[count, columns] in `scratch`, or of their own."""
    if scratch is None:
        return torch.empty(count, columns, dtype=like.dtype, device=like.device)
    return scratch.view(-1)[: count * columns].view(count, columns)


def _grouped(
    x: Tensor, layer: Experts, tile: ExpertsTile, call: _Call, routing: Routing, scratch: Tensor | None, fused: bool
) -> Tensor:
    """`hidden` from tokens where `fused`, else `parts` from `hidden`."""
    weight = layer.gate_up if fused else layer.down
    scale, bias = (layer.gate_up_scale, layer.gate_up_bias) if fused else (layer.down_scale, layer.down_bias)
    cut = tile.gate_up if fused else tile.down
    N, K = weight.shape[1] // (1 + fused), weight.shape[2]
    out = _rows(layer.ids.numel(), N, x, scratch)
    constants, options = _grouped_constants(call, cut, tile.narrow, K, fused, bias is not None)
    tensors = x, weight, scale, bias, layer.weights, out
    arguments = *tensors, *routing, x.shape[0], N, K, routing.most_blocks
    variant = "experts", fused, cut, tile.narrow, N, K, call, traits(*tensors)
    grid = routing.most_blocks * blocks(N, cut.block_n // (1 + fused)), 1, 1
    launch(products.grouped_kernel, variant, grid, arguments, constants, options)
    return out


@cache
def _grouped_constants(
    call: _Call, cut: TritonTile, narrow: int, k: int, fused: bool, has_bias: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's parameters behind its arguments, in order, and options for compiling it."""
    constants = dict(EXPERTS=call.experts, FUSED=fused, HAS_BIAS=has_bias, TOPK=call.topk)
    constants |= dict(zip(("OAI", "ALPHA", "LIMIT"), call.activation, strict=True))
    constants |= dict(BLOCK_M=cut.block_m, NARROW=narrow, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k)
    constants |= dict(SLICES=cut.slices, GROUP=cut.group, EVEN_K=k % cut.block_k == 0)
    return _finished(constants, call, cut)


def _finished(constants: dict, call: _Call, cut: TritonTile) -> tuple[dict[str, Any], dict[str, Any]]:
    pdl = dependent_launch(call.device)
    # The interpreter's dot of bf16 operands is silently wrong: there both operands are widened to fp32.
    dot = tl.float32 if knobs.runtime.interpret else _DOT[call.dtype]
    options = dict(num_warps=cut.num_warps, num_stages=cut.num_stages, launch_pdl=pdl)
    return constants | dict(DOT=dot, PDL=pdl), options


def _sum(parts: Tensor, layer: Experts, call: _Call, out: Tensor, places: Tensor | None = None) -> None:
    M, H = out.shape
    pdl = dependent_launch(call.device)
    block = min(_SUM_BLOCK, triton.next_power_of_2(H))
    constants = dict(TOPK=call.topk, HAS_MAP=call.has_map, BLOCK=block, PDL=pdl)
    arguments = parts, places, layer.ids, layer.expert_map, out, H
    variant = "sum", H, call, traits(*arguments[:-1])
    options = dict(num_warps=4, launch_pdl=pdl)
    launch(products.sum_kernel, variant, (M, blocks(H, block), 1), arguments, constants, options)


def _pairs(x: Tensor, layer: Experts, tile: ExpertsTile, call: _Call, scratch: Tensor | None, out: Tensor) -> None:
    (M, H), I, pairs = x.shape, layer.down.shape[2], layer.ids.numel()
    hidden = _rows(pairs, I, x, scratch)
    tensors = x, layer.gate_up, layer.gate_up_scale, layer.gate_up_bias, hidden, layer.ids, layer.expert_map
    variant = "pairs_gate_up", tile.gate_up, H, I, call, traits(*tensors)
    constants, options = _pairs_constants(call, tile.gate_up, H, layer.gate_up_bias is not None, True)
    grid = blocks(I, tile.gate_up.block_n // 2), pairs, 1
    launch(products.pairs_gate_up_kernel, variant, grid, (*tensors, I, H), constants, options)
    tensors = hidden, layer.down, layer.down_scale, layer.down_bias, layer.weights, out, layer.ids, layer.expert_map
    variant = "pairs_down", tile.down, H, I, call, traits(*tensors)
    constants, options = _pairs_constants(call, tile.down, I, layer.down_bias is not None, False)
    grid = blocks(H, tile.down.block_n), M, 1
    launch(products.pairs_down_kernel, variant, grid, (*tensors, H, I), constants, options)


@cache
def _pairs_constants(
    call: _Call, cut: TritonTile, k: int, has_bias: bool, fused: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `_grouped_constants`."""
    constants = dict(TOPK=call.topk, HAS_BIAS=has_bias, HAS_MAP=call.has_map)
    if fused:
        constants |= dict(zip(("OAI", "ALPHA", "LIMIT"), call.activation, strict=True))
    else:
        constants |= dict(SLOTS=triton.next_power_of_2(call.topk))
    constants |= dict(BLOCK_N=cut.block_n, BLOCK_K=cut.block_k)
    if fused:
        constants |= dict(EVEN_K=k % cut.block_k == 0)
    return _finished(constants, call, cut)
