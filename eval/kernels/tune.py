"""The fastest tile for each operator, weight and number of tokens on this card: `rowint8 tune`.

Candidates are compiled ahead in several processes, which leaves them in Triton's cache, then timed one by one as
`bench_kernels` times: in CUDA graphs, over copies of the weight that exceed the L2 cache. What seems fastest is timed
once more beside the shipped tile, which stays unless it is beaten by more than noise. `kernels/tiles/user.py`
describes the file of the outcome.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError, as_completed
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.baseline_engine.errors import one_line
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.bench import check_agrees
from rowint8.eval.kernels.shapes import Shape
from rowint8.eval.kernels.timing import Call, graph_us, rotated_copies
from rowint8.eval.results.schema import KernelRow
from rowint8.eval.tables import Table
from rowint8.eval.writing import write_file
from rowint8.kernels import dispatch
from rowint8.kernels.quantize import Int8Weight
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.hopper_cost import hopper_candidates
from rowint8.kernels.tiles.types import MOST_FEW_TOKENS, FewTokensTile, Tile, TritonTile
from rowint8.kernels.tiles.user import Tiles, with_tiles

NOISE = 0.02
"""A tile must be faster than the shipped one by this part of its time."""
_FINALISTS = 3
_PROCESSES = 8
_DTYPE = torch.bfloat16
_ITEMSIZE = 2
"""Bytes of an activation: tables are for 16 bits."""
_FEW = 16
_POINTERS_ON_HOPPER = 32
"""Beyond this many tokens a Hopper card has nothing to gain from the kernels that read through pointers."""


Timer = Callable[[Sequence[Call]], tuple[float, float]]
"""(median, spread) of one of the calls, in microseconds."""


class Job(NamedTuple):
    """What one tile is chosen for."""

    op: Any
    shape: Shape
    m: int
    tiles: list[Tile]


class Choice(NamedTuple):
    row: KernelRow
    """Times of the "shipped" and the "tuned" tile, which may be the same."""
    tile: Tile
    failed: int
    """Candidates that did not compile, or computed something else."""


def make_jobs(shapes: Sequence[Shape], tokens: Sequence[int], device: torch.device) -> list[Job]:
    """A job for each product and number of tokens, by shape."""
    card = card_of(device)
    return [
        Job(op, shape, m, candidates(op, m, card.shared_memory, card.hopper_processors > 0))
        for shape in shapes
        for op in shape.ops
        if op in dispatch.OPERATORS
        for m in sorted(tokens)
    ]


def candidates(op: str, m: int, shared_memory: int, on_hopper: bool) -> list[Tile]:
    """Tiles for `op` on m tokens.

    Args:
        shared_memory: bytes that one program may use on the card.
    """
    tiles: list[Tile] = []
    if m <= _POINTERS_ON_HOPPER or not on_hopper:
        made = _one_token(op) if m == 1 else _few_tokens() if m <= _FEW else _many_tokens(m)
        tiles += [tile for tile in made if tile.shared_memory(_ITEMSIZE) <= shared_memory]
    if 1 < m <= MOST_FEW_TOKENS:
        tiles += [FewTokensTile(warps, warps * block_k) for warps, block_k in product((2, 4, 8), (128, 256))]
    return [*tiles, *(hopper_candidates(op, m) if on_hopper and m > 1 else ())]


def _one_token(op: str) -> list[TritonTile]:
    """8 to 64 weights of a step for each thread; SwiGLU has rows in pairs."""
    rows = (2, 4, 8) if op == "swiglu" else (1, 2, 4, 8)
    return [
        TritonTile(1, n, k, warps, 1, overlaps=True)
        for n, k, warps in product(rows, (512, 1024, 2048), (1, 2, 4))
        if 16 <= n * k // (32 * warps) <= 64
    ]


def _few_tokens() -> list[TritonTile]:
    """8 to 32 KiB of weights in a stage; the small ones are cut into slices, or have few warps."""
    return [
        TritonTile(_FEW, n, k, warps, stages, slices=slices, overlaps=True)
        for n, k, (warps, slices), stages in product((16, 32, 64), (128, 256, 512), ((2, 1), (4, 4), (4, 1)), (3, 4))
        if 4096 <= n * k <= 16384 and (slices == 1 or n * k == 8192 or n == 16) and n // 16 <= warps * 2
    ]


def _many_tokens(m: int) -> list[TritonTile]:
    """Blocks of about m tokens, at most 256; 32 to 64 sums for each thread."""
    most = min(256, max(32, 1 << (m - 1).bit_length()))
    sizes = [size for size in (32, 64, 128, 256) if most // 4 <= size <= most]
    return [
        TritonTile(block_m, n, k, warps, stages)
        for block_m, n, k, warps, stages in product(sizes, (32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4))
        if 8 <= block_m * n // (32 * warps) <= 64 and 4096 <= n * k <= 16384 and k * block_m <= 16384
    ]


def compilations(jobs: Sequence[Job]) -> list[tuple[Job, Tile]]:
    """Each kernel once, with a job that can use it: most do not depend on the shape."""
    by_kernel = {}
    for job in jobs:
        for tile in job.tiles:
            by_kernel.setdefault(dispatch.compilation(job.op, tile, job.shape.n, job.shape.k), (job, tile))
    return list(by_kernel.values())


def compile_ahead(wanted: Sequence[tuple[Job, Tile]], seconds: float, advance: Callable[[], None]) -> None:
    """Fills Triton's cache on disk, for at most `seconds`; what fails or is left will show when it is timed."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(_PROCESSES, os.cpu_count() or 1), context)
    futures: list[Future] = [pool.submit(_compile, *job[:3], tile) for job, tile in wanted]
    try:
        for _ in as_completed(futures, timeout=seconds):
            advance()
    except TimeoutError:
        pass
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(op: str, shape: Shape, m: int, tile: Tile) -> None:
    values = torch.empty(shape.n, shape.k, dtype=torch.int8, device="cuda")
    x, scale = torch.empty(m, shape.k, dtype=_DTYPE, device="cuda"), values.new_empty(shape.n).half()
    dispatch.run(op, x, values, scale, tile=tile)


def choose_tiles(
    jobs: Sequence[Job], seconds: float, device: torch.device, timer: Timer = graph_us
) -> Iterator[Choice]:
    """A choice for each job, in order, as soon as it is made; no job is begun when `seconds` are over."""
    end = time.monotonic() + seconds
    for job in jobs:
        if time.monotonic() > end:
            return
        yield _choose(job, device, timer)


def _choose(job: Job, device: torch.device, timer: Timer) -> Choice:
    (_, n, k, _), m = job.shape, job.m
    weights = _weights(n, k, device)
    x = torch.randn(m, k, device=device).to(_DTYPE)
    shipped = dispatch.choose(job.op, x, weights[0].values, of_user=False)
    calls = partial(_calls, job.op, x, weights)
    timed = partial(_timed, calls, calls(shipped)[0](), timer)
    first = {tile: timed(tile) for tile in dict.fromkeys([shipped, *job.tiles])}
    ranked = sorted((us, index, tile) for index, (tile, us) in enumerate(first.items()) if us)
    final = {tile: timed(tile) for tile in dict.fromkeys([shipped, *(tile for *_, tile in ranked[:_FINALISTS])])}
    again = {tile: us for tile, us in final.items() if us}
    if shipped not in again:
        raise EvalError(f"the shipped {shipped} does not run on this card ({job.op} {n}x{k} with {m} tokens)")
    best = min(again, key=lambda tile: again[tile])
    tile = best if again[best][0] < (1 - NOISE) * again[shipped][0] else shipped
    failed = sum(us is None for us in first.values())
    return Choice(_row(job, {"shipped": again[shipped], "tuned": again[tile]}), tile, failed)


def _calls(op: str, x: Tensor, weights: Sequence[Int8Weight], tile: Tile) -> list[Call]:
    """A call for each copy of the weight."""
    return [partial(dispatch.run, op, x, *weight, tile=tile) for weight in weights]


def _timed(
    calls: Callable[[Tile], Sequence[Call]], reference: Tensor, timer: Timer, tile: Tile
) -> tuple[float, float] | None:
    """Median and spread of the calls with a tile; None where it does not run, or computes something else."""
    try:
        check_agrees(calls(tile)[0](), reference)
        return timer(calls(tile))
    except Exception:  # whatever a compiler or a driver says of a candidate, others remain
        return None


def _row(job: Job, timed: dict[str, tuple[float, float]]) -> KernelRow:
    us = {which: median for which, (median, _) in timed.items()}
    spread = {which: spread for which, (_, spread) in timed.items()}
    return KernelRow(op=job.op, shape=job.shape.name, M=job.m, N=job.shape.n, K=job.shape.k, us=us, spread=spread)


@lru_cache(maxsize=1)
def _weights(n: int, k: int, device: torch.device) -> list[Int8Weight]:
    """Random weights that together exceed the L2 cache several times."""
    copies = rotated_copies(n, k)
    values = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) for _ in range(copies)]
    return [Int8Weight(each, torch.rand(n, device=device).half() / 128) for each in values]


def write_tiles(path: Path, card: str, tiles: Tiles) -> None:
    """Puts the tiles of a card into a file, as `write_file` writes it.

    Raises:
        EvalError: the file cannot be written, or holds something else.
    """
    try:
        write_file(path, with_tiles(path, card, tiles))
    except ValueError as error:
        raise EvalError(str(error)) from None


def tune_table(choices: Sequence[Choice], card: str) -> Table:
    """A line a choice."""
    failed = sum(choice.failed for choice in choices)
    rows = [choice.row for choice in choices]
    return Table(
        ["op", "shape", "M", "shipped", "tuned", "gain"],
        [[row.op, row.shape, str(row.M), *_gain(row.us["shipped"], row.us["tuned"])] for row in rows],
        title=f"microseconds a call on {card}",
        note=f"{failed} candidates did not run",
        words=2,
    )


def _gain(shipped: float, tuned: float) -> list[str]:
    return [f"{shipped:.1f}", f"{tuned:.1f}", f"{1 - tuned / shipped:.0%}"]


def model_shapes(folder: Path) -> list[Shape]:
    """The products of a dense decoder on one GPU, from the config.json in its folder.

    Raises:
        EvalError: there is none, or it lacks the sizes.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise EvalError(f"{folder} is not a model folder (no config.json)")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        hidden, heads, intermediate = config.hidden_size, config.num_attention_heads, config.intermediate_size
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        qkv = (heads + 2 * getattr(config, "num_key_value_heads", heads)) * head_dim
    except Exception as error:  # a config may hold anything, and each family fails at it in its own way
        raise EvalError(f"{folder} has no config.json of a dense decoder: {one_line(error)}") from None
    return [
        Shape("qkv", qkv, hidden),
        Shape("o", hidden, heads * head_dim),
        Shape("gate_up", 2 * intermediate, hidden, ("linear", "swiglu")),
        Shape("down", hidden, intermediate),
    ]
