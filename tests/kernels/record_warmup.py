"""What `warmup` compiles and what is launched later: `python -m tests.kernels.record_warmup`, not interpreted.

Launches are recorded on the cards of `fake_cards`, nothing is compiled. Prints one JSON object per card, model, dtype
and limit: how many kernels were warmed up, how many variants `warmup` says there are, and which launches with random
numbers of tokens, up to the limit or beyond, need a kernel that was not.
"""

import json
import random
from collections.abc import Iterator

import torch

from rowint8.eval.kernels.shapes import select_shapes
from rowint8.kernels.tiles.hopper_cost import HOPPER_TILES
from rowint8.kernels.tiles.pick import TileConfig
from rowint8.kernels.tiles.user import use_tiles
from rowint8.kernels.warmup import WeightShape, warmup
from tests.kernels.fake_cards import Launch, install, on_card, recorded

_DRAWS = 40


def weights(model: str, bias: bool) -> list[WeightShape]:
    return [WeightShape(op, s.n, s.k, bias and op == "linear") for s in select_shapes(model) for op in s.ops]


def compare(card: str, model: str, bias: bool, dtype: torch.dtype, limit: int, tokens: range) -> dict:
    """Warms up for `limit` tokens, then launches with numbers drawn from `tokens`."""
    shapes = weights(model, bias)
    ready = []
    with on_card(card) as device:
        warmed = recorded(lambda: ready.append(warmup(shapes, dtype, device, limit)))
    missing = [
        f"{op} {m}x{n}x{k}: {kernel}"
        for op, n, k, has_bias in shapes
        for m in random.sample(tokens, min(_DRAWS, len(tokens)))
        for kernel in recorded(Launch(card, op, m, n, k, has_bias, dtype).run) - warmed
    ]
    return dict(case=f"{card} {model} {dtype} {limit}", warmed=len(warmed), variants=ready[0].kernels, missing=missing)


def cases() -> Iterator[dict]:
    within = range(1, 3001)
    for card in ("sm80", "sm86", "sm90", "sm120"):
        yield compare(card, "llama-3.1-8b", False, torch.bfloat16, 3000, within)
    yield compare("sm90", "qwen2.5-0.5b", True, torch.float16, 3000, within)
    yield compare("sm89", "qwen2.5-0.5b", True, torch.float32, 3000, within)
    yield compare("sm90", "llama-3.1-70b-tp8", False, torch.bfloat16, 5, range(1, 6))
    for op, n, k, _ in weights("llama-3.1-8b", False):
        use_tiles(op, n, k, {1: TileConfig(1, 4, 512, 1, 1), 37: TileConfig(32, 32, 64, 4, 3), 91: HOPPER_TILES[4]})
    yield compare("sm90", "llama-3.1-8b", False, torch.bfloat16, 100, range(1, 101))
    yield compare("sm80", "llama-3.1-8b", False, torch.bfloat16, 16, range(1000, 1001)) | {"beyond": True}


if __name__ == "__main__":
    install()
    for case in cases():
        print(json.dumps(case), flush=True)
