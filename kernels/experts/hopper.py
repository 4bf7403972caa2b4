"""The experts on Hopper cards: both products by the kernel for dense layers, whose tiles then are blocks of experts.

TMA reads rows that lie together, so tokens are copied once for each of their experts, in the order of the sort. With
INT8 tokens a quarter or half of that is copied, and `hidden` is rounded once it is there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowint8.kernels.experts.routing import Routing, overlap_previous, route
from rowint8.kernels.hopper.launch import hopper_grouped
from rowint8.kernels.int8_tokens import quantize_tokens
from rowint8.kernels.launch import dependent_launch, launch, traits
from rowint8.kernels.tiles.types import HopperTile


class Rotation(NamedTuple):
    """Blocks of the rotation of INT8 tokens: see `activations`."""

    of_tokens: int
    of_hidden: int


class Sorted(NamedTuple):
    """Tokens by place, one for each pair."""

    rows: Tensor
    """[pairs, H], as the tokens."""
    scale: Tensor | None
    """fp32 [pairs]; None where the tokens have no scale."""
    weights: Tensor
    """fp32 [pairs]: each pair's weight."""
    places: Tensor
    """int32 [pairs]: the place of each pair by its number; of those that are here."""


@triton.jit(do_not_specialize=["pairs", "most_blocks"])
def gather_kernel(
    x,
    token_scale,
    pair_weights,
    rows,
    scale,
    weights,
    places,
    order,
    blocks,
    count,
    pairs,
    most_blocks,
    K,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs,): the token of a place. Behind the last place there is nothing to do."""
    overlap_previous(PDL)
    place = tl.program_id(0).to(tl.int64)
    found = tl.load(count)
    end = tl.load(blocks + 2 * most_blocks + found - 1, mask=found > 0, other=0)
    if place < end:
        pair = tl.load(order + place)
        token = (pair // TOPK).to(tl.int64)
        for first in range(0, K, BLOCK):
            k = first + tl.arange(0, BLOCK)
            tl.store(rows + place * K + k, tl.load(x + token * K + k, mask=k < K), mask=k < K)
        tl.store(weights + place, tl.load(pair_weights + pair).to(tl.float32))
        tl.store(places + pair, place.to(tl.int32))
        if token_scale is not None:
            tl.store(scale + place, tl.load(token_scale + token))


def gather(x: Tensor, token_scale: Tensor | None, weights: Tensor, routing: Routing, topk: int) -> Sorted:
    """Contiguous tokens [M, H] in the order of the sort."""
    pairs, device, (_, K) = len(routing.order), x.device, x.shape
    rows = torch.empty(pairs, K, dtype=x.dtype, device=device)
    of_token, of_pair = (torch.empty(pairs, dtype=torch.float32, device=device) for _ in range(2))
    scale = None if token_scale is None else of_token
    places = torch.empty(pairs, dtype=torch.int32, device=device)
    tensors = x, token_scale, weights, rows, scale, of_pair, places, routing.order, routing.blocks
    arguments = *tensors, routing.block_count, pairs, routing.most_blocks, K
    pdl = dependent_launch(device)
    constants = dict(TOPK=topk, BLOCK=min(2048, triton.next_power_of_2(K)), PDL=pdl)
    variant = "gather", K, topk, traits(x, token_scale, weights)
    launch(gather_kernel, variant, (pairs, 1, 1), arguments, constants, dict(num_warps=4, launch_pdl=pdl))
    return Sorted(rows, scale, of_pair, places)


def hopper_parts(
    x: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    weights: Tensor,
    ids: Tensor,
    expert_map: Tensor | None,
    tile: HopperTile,
    rotation: Rotation | None,
) -> tuple[Tensor, Tensor]:
    """(parts [pairs, H] by place, the place of each pair) of contiguous 16-bit tokens [M, H], silu as the activation.

    Args:
        gate_up: int8 [experts, 2I, H] and fp16 [experts, 2I]; down: likewise [experts, H, I].
        tile: one for INT8 tokens where there is a `rotation`.
    """
    routing = route(ids, expert_map, len(down[0]), tile.width)
    count = routing.block_count
    tokens, token_scale = quantize_tokens(x, rotation.of_tokens) if rotation else (x, None)
    placed = gather(tokens, token_scale, weights, routing, ids.shape[1])
    pairs, I = ids.numel(), down[0].shape[2]
    hidden = torch.empty(pairs, I, dtype=x.dtype, device=x.device)
    hopper_grouped(placed.rows, placed.scale, *gate_up, routing.blocks, count, tile, hidden, fused=True)
    factor = placed.weights
    if rotation:
        hidden, factor = quantize_tokens(hidden, rotation.of_hidden, times=factor)
    parts = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=x.device)
    hopper_grouped(hidden, factor, *down, routing.blocks, count, tile, parts, fused=False)
    return parts, placed.places


def hopper_serves(
    x: Tensor, gate_up: Tensor, down: Tensor, activation: str, limit: float | None, has_bias: bool
) -> bool:
    """Whether the Hopper kernel computes such experts of tokens like these, and TMA can read them."""
    I, K = down.shape[2], gate_up.shape[2]
    plain = activation == "silu" and limit is None and not has_bias
    return plain and x.dtype != torch.float32 and I % 16 == 0 and K % 16 == 0 and x.data_ptr() % 16 == 0
