"""Kernel times on a CUDA GPU: the operators of this project beside cuBLAS in bf16, over shapes and numbers of tokens.

A call's time is that of one kernel in a CUDA graph of many calls, so launch gaps do not count. The calls rotate over
copies of the weight that together exceed the L2 cache several times, as the layers of a model do. A graph is replayed
seven times; the median counts and the spread is (slowest - fastest) / median.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import silu

from rowint8.baseline_engine.metrics import speedup
from rowint8.eval import kernel_peers
from rowint8.eval.console import compact_table
from rowint8.eval.kernel_peers import Product
from rowint8.eval.schema import Ceilings, KernelRow
from rowint8.kernels import ops
from rowint8.kernels.quantize import Int8Weight, quantize_rowwise

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""[N, K] of Llama-3.1-8B's linear layers, q, k, v and gate, up stacked."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
REPLAYS = 7
_ROTATE_BYTES = 512 << 20
_MATMUL = 8192
_READ_BYTES = 4 << 30

Call = Callable[[], Tensor]


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


def measure_ceilings() -> Ceilings:
    """What this card does at best: bytes read by a reduction over 4 GiB, and a square bf16 product."""
    data = torch.ones(_READ_BYTES // 4, device="cuda")
    read_us, _ = graph_us([data.sum])
    a, b = (torch.randn(_MATMUL, _MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul_us, _ = graph_us([lambda: a @ b] * 3)
    return Ceilings(read_tb_s=_READ_BYTES / read_us / 1e6, bf16_tflop_s=2 * _MATMUL**3 / matmul_us / 1e6)


def bench(
    shapes: Sequence[str], tokens: Sequence[int], announce: Callable[[str], None], peers: bool = False
) -> Iterator[KernelRow]:
    """Times `linear` for every shape and number of tokens, and `swiglu` for gate_up.

    With `peers`, also the 8-bit products of `kernel_peers` that are installed; `announce` is told which are not.
    """
    for shape in shapes:
        announce(shape)
        n, k = SHAPES[shape]
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(_copies(n, k))]
        int8 = [quantize_rowwise(weight) for weight in dense]
        products = _peer_products(k, int8, announce) if peers else {}
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            others = {name: [partial(call, x) for call in calls] for name, calls in products.items()}
            yield _row("linear", shape, m, linear_candidates(x, dense, int8) | others)
            if shape == "gate_up":
                yield _row("swiglu", shape, m, swiglu_candidates(x, dense, int8, peers))


def _peer_products(k: int, int8: list[Int8Weight], announce: Callable[[str], None]) -> dict[str, list[Product]]:
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    products, absent = kernel_peers.prepare(x, int8, ops.linear(x, *int8[0]))
    for name, reason in absent.items():
        announce(f"without {name}: {reason}")
    return products


def linear_candidates(x: Tensor, dense: list[Tensor], int8: list[Int8Weight]) -> dict[str, list[Call]]:
    """Name to one call per copy of the weight."""
    return {
        "rowint8": [lambda w=w: ops.linear(x, *w) for w in int8],
        "cublas_bf16": [lambda w=w: dense_linear(x, w) for w in dense],
    }


def swiglu_candidates(x: Tensor, dense: list[Tensor], int8: list[Int8Weight], peers: bool) -> dict[str, list[Call]]:
    """Name to one call per copy of the weight. With `peers`, the unfused products end in vLLM's activation kernel."""
    activation = kernel_peers.vllm_silu_and_mul if peers else _silu_and_mul
    return {
        "rowint8": [lambda w=w: ops.swiglu(x, *w) for w in int8],
        "unfused": [lambda w=w: activation(ops.linear(x, *w)) for w in int8],
        "cublas_bf16": [lambda w=w: activation(dense_linear(x, w)) for w in dense],
    }


def _copies(n: int, k: int) -> int:
    return max(2, min(32, _ROTATE_BYTES // (n * k)))


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    """Two of torch's kernels."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def _row(op: Literal["linear", "swiglu"], shape: str, m: int, candidates: dict[str, list[Call]]) -> KernelRow:
    n, k = SHAPES[shape]
    timed = {name: graph_us(calls) for name, calls in candidates.items()}
    return KernelRow(
        op=op,
        shape=shape,
        M=m,
        N=n,
        K=k,
        us={name: median for name, (median, _) in timed.items()},
        spread={name: spread for name, (_, spread) in timed.items()},
    )


def limit_us(row: KernelRow, ceilings: Ceilings) -> float:
    """The least time that the card allows: the INT8 weight read once or the products done, whichever is longer."""
    reading = (row.N * row.K + 2 * row.N + 2 * row.M * row.K) / (ceilings.read_tb_s * 1e6)
    computing = 2 * row.M * row.N * row.K / (ceilings.bf16_tflop_s * 1e6)
    return max(reading, computing)


def kernel_table(rows: Sequence[KernelRow], ceilings: Ceilings) -> Table:
    """One line a row: times, achieved bandwidth and rate, the share of the limit, the speedup over the best other."""
    table = compact_table(
        "microseconds a call, bf16 activations",
        f"read ceiling {ceilings.read_tb_s:.2f} TB/s, bf16 product {ceilings.bf16_tflop_s:.0f} TFLOP/s; "
        "of limit: the longer of reading and computing at those ceilings / time; speedup: over the best other",
    )
    for heading in ("op", "shape"):
        table.add_column(heading)
    others = [name for name in dict.fromkeys(name for row in rows for name in row.us) if name != "rowint8"]
    for heading in ("M", "rowint8", *others, "speedup", "GB/s", "TFLOP/s", "of limit"):
        table.add_column(heading, justify="right")
    for row in rows:
        ours = row.us["rowint8"]
        table.add_row(
            row.op,
            row.shape,
            str(row.M),
            f"{ours:.1f}",
            *(f"{row.us[name]:.1f}" if name in row.us else "" for name in others),
            f"{speedup(min(us for name, us in row.us.items() if name != 'rowint8'), ours):.2f}x",
            f"{row.N * row.K / ours / 1e3:.0f}",
            f"{2 * row.M * row.N * row.K / ours / 1e6:.1f}",
            f"{limit_us(row, ceilings) / ours:.0%}",
        )
    return table
