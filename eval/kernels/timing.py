"""How kernels are timed on a CUDA GPU, beside one another, and what the GPU does at best.

Calls are captured into a CUDA graph, so launch gaps do not count, and a replay's time over the number of calls is a
sample. A kernel that spins goes ahead of each replay: the host has queued all of it before its first call runs.

Candidates that are compared are *paired*: their graphs are replayed in turns, with the order reversed in every other
round, so that clocks and heat, which drift, are the same for all. The median of the rounds counts; the spread is
(slowest - fastest) / median. The ratio of two is the median of the rounds' ratios. Its interval lies between two of
the ratios, as many from the lowest as from the highest: of 12 the third and the tenth. It covers the median of all
such ratios with a probability of at least 95% (96.1% of 12), whatever their distribution.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rowint8.eval.results.schema import Ceilings, Ratio

Call = Callable[[], Any]
"""Launches the work that is timed."""
Replay = Callable[[], float]
"""Runs captured calls; microseconds a call."""

ROUNDS = 12
REPLAYS = 7
"""How often a graph on its own is replayed."""
_COVERED = 0.95
_SPIN_CYCLES = 200_000
"""About 0.1 ms."""
_MATMUL = 8192
_READ_BYTES = 4 << 30
_ROTATED_BYTES = 512 << 20
_MOST_COPIES = 128


def capture(calls: Sequence[Call]) -> Replay:
    """Captures all calls into one graph, in order."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return partial(_replay_us, graph, len(calls))


def _replay_us(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_SPIN_CYCLES)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / calls


def in_turns(replays: Mapping[str, Replay], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Name to its time in every round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    order = list(replays)
    for _ in range(rounds + 1):
        for name in order:
            times[name].append(replays[name]())
        order.reverse()
    return {name: each[1:] for name, each in times.items()}


def summary(times: Sequence[float]) -> tuple[float, float]:
    """(median, spread)."""
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def paired_ratio(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """Ours over the other's, round by round. Of fewer than six rounds the interval is the whole range."""
    ratios = sorted(one / other for one, other in zip(ours, others, strict=True))
    cut = _cut(len(ratios))
    return Ratio(value=statistics.median(ratios), low=ratios[cut], high=ratios[-1 - cut])


def _cut(count: int) -> int:
    """How many values may go at either end, with the median still between the others in `_COVERED` of all cases."""
    outside, cut = 2 / 2**count, 0
    while outside + 2 * math.comb(count, cut + 1) / 2**count <= 1 - _COVERED:
        cut += 1
        outside += 2 * math.comb(count, cut) / 2**count
    return cut


def graph_us(calls: Sequence[Call]) -> tuple[float, float]:
    """(median, spread) of one call in microseconds, timed on its own."""
    replay = capture(calls)
    replay()
    return summary([replay() for _ in range(REPLAYS)])


def rotated_copies(n: int, k: int) -> int:
    """How many INT8 [n, k] weights to take turns with, so that none is found in the L2 cache."""
    return max(2, min(_MOST_COPIES, _ROTATED_BYTES // (n * k)))


def measure_ceilings() -> Ceilings:
    """What this card does at best: bytes read by a reduction over 4 GiB, and a square bf16 product."""
    data = torch.ones(_READ_BYTES // 4, device="cuda")
    read_us, _ = graph_us([data.sum])
    a, b = (torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul_us, _ = graph_us([lambda: a @ b] * 3)
    return Ceilings(read_tb_s=_READ_BYTES / read_us / 1e6, bf16_tflop_s=2 * _MATMUL**3 / matmul_us / 1e6)
