"""Finds the fastest tiles of `ops.experts` on a CUDA GPU: `python -m rowint8.eval.kernels.experts_sweep`.

The two products are swept one after the other, each beside the shipped tile of the other, for every width of a block of
tokens that the counts allow. Prints a JSON object for each model, routing and number of tokens: its best tiles, first
the fastest, and the shipped one. Candidates that do not compile or compute something else are left out and counted.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import torch

from rowint8.eval.kernels.experts_bench import ROUTINGS, Routed, Weights, random_calls, random_weights
from rowint8.eval.kernels.rows import check_agrees
from rowint8.eval.kernels.shapes import EXPERTS, ExpertsShape
from rowint8.eval.kernels.timing import graph_us
from rowint8.kernels.experts.launch import experts
from rowint8.kernels.experts.tiles import ExpertsTile, pick_tile
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.types import TritonTile

_BEST = 3
_THREADS = 12
"""That compile, each with a CUDA context once it has called the runtime."""


def widths(shape: ExpertsShape, m: int) -> Iterator[tuple[int, int]]:
    """(block_m, narrow) worth a try for m tokens."""
    mean = min(512, m * shape.topk / min(shape.experts, m * shape.topk))
    if mean <= 2:
        yield 1, 0
    for block_m in (16, 32, 64, 128, 256):
        if block_m <= 4 * max(4, mean) and mean <= 4 * block_m:
            yield from ((block_m, narrow) for narrow in (0, max(16, block_m // 4)) if narrow < block_m)


def cuts(block_m: int, gate_up: bool) -> Iterator[TritonTile]:
    """Tiles of one product."""
    if block_m == 1:
        sizes = product((2, 4, 8) if gate_up else (1, 2, 4), (256, 512, 1024), (1, 2, 4, 8))
        yield from (TritonTile(1, n, k, warps, 1) for n, k, warps in sizes)
        return
    for n, k, warps, stages in product((32, 64, 128, 256), (64, 128, 256, 512), (4, 8), (2, 3, 4, 5)):
        held, bytes_ = block_m * n // (32 * warps), stages * k * (n + 2 * block_m)
        if held <= 128 and 4096 <= n * k <= 32768 and 24 << 10 <= bytes_ <= 220 << 10 and n >= 16 * warps:
            yield TritonTile(block_m, n, k, warps, stages)
        if block_m == 16 and n == 32 and k >= 256 and warps == 4:
            yield TritonTile(16, 16, k, 4, stages, slices=4)


def candidates(best: ExpertsTile, gate_up: bool) -> Iterator[ExpertsTile]:
    """Tiles that differ from the best so far in one product."""
    for cut in cuts(best.block_m, gate_up):
        yield replace(best, **{"gate_up" if gate_up else "down": cut})


def compile_all(weights: Weights, call: Routed, tiles: Sequence[ExpertsTile]) -> None:
    """What would else be compiled one after the other."""

    def attempt(tile: ExpertsTile) -> None:
        try:
            experts(call.x, *weights, *call[1:], tile=tile)
        except Exception:  # it is told when the tile is timed
            return

    with ThreadPoolExecutor(_THREADS, initializer=torch.cuda.synchronize) as pool:
        list(pool.map(attempt, tiles))
    torch.cuda.synchronize()


def timed(weights: Weights, calls: list[Routed], tile: ExpertsTile, reference: torch.Tensor) -> float | None:
    """Microseconds a call; None where it does not run or computes something else."""
    try:
        work = [partial(experts, call.x, *weights, *call[1:], tile=tile) for call in calls]
        check_agrees(work[0](), reference)
        return graph_us(work)[0]
    except Exception:  # whatever a compiler or a driver says of a candidate, others remain
        return None


def sweep(shape: ExpertsShape, weights: Weights, m: int, routing: str) -> dict:
    """What is printed for one number of tokens."""
    calls = random_calls(shape, m, routing, torch.bfloat16, "cuda")
    shipped = pick_tile(m, shape.topk, shape.experts, 2, card_of(calls[0].x.device))
    assert isinstance(shipped, ExpertsTile)  # the Hopper kernel has few tiles, which are swept by hand
    reference = experts(calls[0].x, *weights, *calls[0][1:])
    found, failed = {shipped: timed(weights, calls, shipped, reference)}, 0
    for block_m, narrow in widths(shape, m):
        best = _of_width(shipped, block_m, narrow)
        both = [tile for gate_up in (True, False) for tile in candidates(best, gate_up)]
        compile_all(weights, calls[0], both)
        for gate_up in (True, False):
            for tile in candidates(best, gate_up):
                if tile not in found:
                    found[tile] = timed(weights, calls, tile, reference)
                    failed += found[tile] is None
            ran = {tile: us for tile, us in found.items() if us and (tile.block_m, tile.narrow) == (block_m, narrow)}
            best = min(ran, key=ran.__getitem__, default=best)
    ranked = sorted(((us, tile) for tile, us in found.items() if us), key=lambda pair: pair[0])
    best = [dict(us=us, **asdict(tile)) for us, tile in ranked[:_BEST]]
    facts = dict(shape=shape.name, routing=routing, m=m, tried=len(found), failed=failed)
    return facts | dict(shipped=dict(us=found[shipped], **asdict(shipped)), best=best)


def _of_width(tile: ExpertsTile, block_m: int, narrow: int) -> ExpertsTile:
    if tile.block_m == block_m:
        return replace(tile, narrow=narrow)
    cut = TritonTile(1, 2, 512, 4, 1) if block_m == 1 else TritonTile(block_m, 64, 128, 4, 3)
    return ExpertsTile(cut, cut, narrow)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(EXPERTS))
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,1024,8192")
    parser.add_argument("--routings", default=",".join(ROUTINGS))
    given = parser.parse_args()
    for name in given.shapes.split(","):
        shape = EXPERTS[name]
        weights = random_weights(shape, "cuda")
        for m, routing in product(given.tokens.split(","), given.routings.split(",")):
            print(json.dumps(sweep(shape, weights, int(m), routing)), flush=True)
