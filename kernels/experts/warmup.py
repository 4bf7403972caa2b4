"""Compiles and loads, before the first request, the kernels that a layer of experts can need (see
`kernels/warmup.py`)."""

from time import perf_counter

import torch
from torch import Tensor

from rowint8.kernels.experts.hopper import Rotation, hopper_serves
from rowint8.kernels.experts.launch import experts
from rowint8.kernels.experts.tiles import ExpertsTile, pick_tile
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.types import HopperTile
from rowint8.kernels.warmup import Ready, in_threads


def warmup(
    layer: tuple[Tensor, Tensor, Tensor, Tensor],
    topk: int,
    dtype: torch.dtype,
    max_tokens: int,
    expert_map: Tensor | None = None,
    activation: tuple = ("silu", 1.0, None),
    rotation: Rotation | None = None,
) -> Ready:
    """Runs experts without biases once for every tile that 1 to `max_tokens` tokens take. Nothing to do on a CPU.

    Args:
        layer: the four weight tensors of `ops.experts`.
        activation: its last three arguments.
        rotation: where tokens are rounded to INT8.
    """
    start, down = perf_counter(), layer[2]
    device, hidden = down.device, down.shape[1]
    many = len(down) if expert_map is None else len(expert_map)
    if device.type != "cuda":
        return Ready(0, 0.0)
    x = torch.empty(1, hidden, dtype=dtype, device=device)
    by_tma = hopper_serves(x, layer[0], down, activation[0], activation[2], False)
    counts = tokens_by_tile(topk, many, 1 if rotation else dtype.itemsize, device, max_tokens, by_tma)

    def run(m: int) -> None:
        with torch.cuda.device(device):
            x = torch.zeros(m, hidden, dtype=dtype, device=device)
            weights = torch.ones(m, topk, device=device)
            for integer in (torch.int32, torch.int64):  # routers give either
                ids = torch.arange(m * topk, dtype=integer, device=device).view(m, topk) % many
                experts(x, *layer, weights, ids, None, None, expert_map, *activation, rotation=rotation)

    in_threads(run, counts.values(), device)
    return Ready(len(counts), perf_counter() - start)


def tokens_by_tile(
    topk: int, experts: int, itemsize: int, device: torch.device, max_tokens: int, by_tma: bool
) -> dict[ExpertsTile | HopperTile, int]:
    """Each tile that 1 to `max_tokens` tokens take, and the smallest number that takes it."""
    card, tiles = card_of(device), {}
    for m in range(1, max_tokens + 1):
        tiles.setdefault(pick_tile(m, topk, experts, itemsize, card, by_tma), m)
    return tiles
