"""How a kernel is timed on a CUDA GPU, and what the GPU does at best.

A call's time is that of one kernel in a CUDA graph of many calls, so launch gaps do not count. A graph is replayed
seven times; the median counts and the spread is (slowest - fastest) / median.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rowint8.eval.results.schema import Ceilings

Call = Callable[[], Any]
"""Launches the work that is timed."""

REPLAYS = 7
_MATMUL = 8192
_READ_BYTES = 4 << 30
_ROTATED_BYTES = 512 << 20


def graph_us(calls: Sequence[Call]) -> tuple[float, float]:
    """(median, spread) of one call in microseconds; all calls are captured into one graph, in order."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = [_replay_us(graph) / len(calls) for _ in range(REPLAYS)]
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def rotated_copies(n: int, k: int) -> int:
    """How many INT8 [n, k] weights to take turns with, so that none is found in the L2 cache."""
    return max(2, min(32, _ROTATED_BYTES // (n * k)))


def measure_ceilings() -> Ceilings:
    """What this card does at best: bytes read by a reduction over 4 GiB, and a square bf16 product."""
    data = torch.ones(_READ_BYTES // 4, device="cuda")
    read_us, _ = graph_us([data.sum])
    a, b = (torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul_us, _ = graph_us([lambda: a @ b] * 3)
    return Ceilings(read_tb_s=_READ_BYTES / read_us / 1e6, bf16_tflop_s=2 * _MATMUL**3 / matmul_us / 1e6)
