"""What `warmup` compiles and what is launched later: `python -m tests.kernels.record_warmup`, not interpreted.

Launches are recorded on the cards of `fake_cards`, nothing is compiled. Prints one JSON object per card, model, dtype
and limit: how many kernels were warmed up, how many variants `warmup` says there are, and which launches with random
numbers of tokens, up to the limit or beyond, need a kernel that was not.
"""

import json
import multiprocessing
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from rowint8.eval.kernels.shapes import select_shapes
from rowint8.eval.kernels.tune import write_tiles
from rowint8.kernels.dispatch import OPERATORS
from rowint8.kernels.experts.hopper import Rotation
from rowint8.kernels.experts.launch import experts
from rowint8.kernels.experts.warmup import warmup as warmup_experts
from rowint8.kernels.tiles.types import HOPPER_TILES, Tile, TritonTile
from rowint8.kernels.warmup import WeightShape, warmup
from tests.kernels.fake_cards import Launch, install, on_card, recorded

_DRAWS = 40


def weights(model: str, bias: bool) -> list[WeightShape]:
    return [WeightShape(op, s.n, s.k, bias and op == "linear") for s in select_shapes(model) for op in s.ops]


def compare(
    card: str, model: str, bias: bool, dtype: torch.dtype, limit: int, tokens: range, tiles: dict[int, Tile]
) -> dict:
    """Warms up for `limit` tokens, then launches with numbers drawn from `tokens`; the user has `tiles`, if any."""
    shapes = weights(model, bias)
    if tiles:
        _use(tiles, card, shapes)
    ready = []
    with on_card(card) as device:
        warmed = recorded(lambda: ready.append(warmup(shapes, dtype, device, limit)))
    missing = [
        f"{op} {m}x{n}x{k}: {kernel}"
        for op, n, k, has_bias in shapes
        for m in random.sample(tokens, min(_DRAWS, len(tokens)))
        for kernel in recorded(Launch(card, op, m, n, k, has_bias, dtype).run) - warmed
    ]
    name, beyond = f"{card} {model} {dtype} {limit}", tokens.start > limit
    return dict(case=name, warmed=len(warmed), variants=ready[0].kernels, missing=missing, beyond=beyond)


def compare_experts(card: str, limit: int, rotation: Rotation | None) -> dict:
    """The same for the experts of Qwen3-30B-A3B as the small engine calls them."""
    ready = []
    with on_card(card) as device:
        sizes = (128, 1536, 2048), (128, 1536), (128, 2048, 768), (128, 2048)
        layer: Any = tuple(
            torch.empty(size, dtype=torch.int8 if len(size) == 3 else torch.float16, device=device) for size in sizes
        )
        warmed = recorded(lambda: ready.append(warmup_experts(layer, 8, torch.bfloat16, limit, rotation=rotation)))

        def run(m: int) -> None:
            x = torch.empty(m, 2048, dtype=torch.bfloat16, device=device)
            weights = torch.empty(m, 8, device=device)
            for integer in (torch.int32, torch.int64):  # as routers give them
                ids = torch.empty(m, 8, dtype=integer, device=device)
                experts(x, *layer, weights, ids, None, None, None, "silu", 1.702, None, rotation=rotation)

        drawn = [1, 2, 8, *random.sample(range(1, limit + 1), _DRAWS)]  # the first ones take kernels of their own
        missing = [f"experts {m}: {kernel}" for m in drawn for kernel in recorded(lambda: run(m)) - warmed]  # noqa: B023
    name = f"{card} experts {rotation} {limit}"
    return dict(case=name, warmed=len(warmed), variants=ready[0].kernels, missing=missing, beyond=False)


def _use(tiles: dict[int, Tile], card: str, shapes: list[WeightShape]) -> None:
    """Writes them to a file for each product, from which this process takes them."""
    path = Path(tempfile.mkdtemp()) / "tiles.json"
    for op, n, k, _ in shapes:
        served = {most: tile for most, tile in tiles.items() if tile.serves(op)}
        if op in OPERATORS:
            write_tiles(path, card, {(op, n, k): served})
    os.environ["ROWINT8_TILES"] = str(path)


WITHIN = range(1, 3001)
TILES = {1: TritonTile(1, 4, 512, 1, 1), 37: TritonTile(32, 32, 64, 4, 3), 91: HOPPER_TILES[4]}
CASES = [
    *((card, "llama-3.1-8b", False, torch.bfloat16, 3000, WITHIN, {}) for card in ("sm80", "sm86", "sm90", "sm120")),
    ("sm90", "qwen2.5-0.5b", True, torch.float16, 3000, WITHIN, {}),
    ("sm89", "qwen2.5-0.5b", True, torch.float32, 3000, WITHIN, {}),
    ("sm90", "llama-3.1-70b-tp8", False, torch.bfloat16, 5, range(1, 6), {}),
    ("sm90", "llama-3.1-8b", False, torch.bfloat16, 100, range(1, 101), TILES),
]
EXPERTS = [("sm80", 3000, None), ("sm90", 3000, None), ("sm90", 8192, Rotation(256, 256))]
BEYOND = ("sm80", "llama-3.1-8b", False, torch.bfloat16, 16, range(1000, 1001), {})


if __name__ == "__main__":
    install()
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:  # a process for each: choices are kept
        for case in pool.starmap(compare, [*CASES, BEYOND], chunksize=1):
            print(json.dumps(case), flush=True)
        for case in pool.starmap(compare_experts, EXPERTS, chunksize=1):
            print(json.dumps(case), flush=True)
