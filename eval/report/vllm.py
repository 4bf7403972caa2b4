"""Rows of `bench vllm` as tables: every number for the console, one time a workload and setup for README.md."""

from collections.abc import Sequence

from rowint8.eval.markdown import number
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import VllmRow
from rowint8.eval.tables import Table

BASE = "bf16"
"""The setup that ratios are taken to."""


def vllm_part(results: Results[VllmRow]) -> str:
    """Time between tokens while decoding, TTFT of prompts alone, start and weights; in brackets bf16's over it."""
    environment = results.environment
    head = f"{environment.device}, vLLM {environment.vllm}, torch {environment.torch}; "
    head += f"medians of {results.rows[0].repeats}, in brackets {BASE}'s time / this one's.\n\n"
    return head + _setups_across(results.rows).markdown()


def _setups_across(rows: Sequence[VllmRow]) -> Table:
    """Workloads down, setups across."""
    first = {row.setup: row for row in reversed(rows)}
    setups = list(dict.fromkeys(row.setup for row in rows))
    lines = []
    for size in sorted({row.size for row in rows}, key=lambda size: (size[2] == 1, size)):
        batch, prompt, output = size
        times = {row.setup: row.ttft_ms if output == 1 else row.itl_ms for row in rows if row.size == size}
        what = f"{batch} x {prompt}: {'TTFT' if output == 1 else 'ITL'} ms"
        lines.append([what, *(_cell(times.get(name), times.get(BASE)) for name in setups)])
    lines.append(["weights GiB", *(f"{first[name].weights_gib:.2f}" for name in setups)])
    lines.append(["engine start s", *(f"{first[name].start_s:.0f}" for name in setups)])
    return Table(["requests x prompt tokens", *setups], lines)


def _cell(time: float | None, base: float | None) -> str:
    return number(time, 2) + (f" ({base / time:.2f})" if time and base else "")


def speed_table(rows: Sequence[VllmRow]) -> Table:
    """A line a workload and setup, the setups of a workload together."""
    lines = []
    for size in dict.fromkeys(row.size for row in rows):
        alike = [row for row in rows if row.size == size]
        base = next((row for row in alike if row.setup == BASE), None)
        lines += [_speed_cells(row, base) for row in alike]
    return Table(
        ["workload", "setup", "TTFT ms", "ITL ms", "TPOT ms", "tok/s", "±", f"x {BASE}", "peak GiB"],
        lines,
        title="vLLM: batch x prompt tokens x output tokens",
        note=f"x {BASE}: tok/s over {BASE}'s of this run; ±: (largest - smallest) / median tok/s over "
        f"{rows[0].repeats} repeats; peak: on a GPU without the KV cache, on a CPU the whole process",
        words=2,
        grouped=True,
    )


def _speed_cells(row: VllmRow, base: VllmRow | None) -> list[str]:
    return [
        "x".join(map(str, row.size)),
        row.setup,
        f"{row.ttft_ms:.1f}",
        "" if row.itl_ms is None else f"{row.itl_ms:.2f}",
        "" if row.tpot_ms is None else f"{row.tpot_ms:.2f}",
        f"{row.tok_s:.0f}" if row.tok_s >= 1000 else f"{row.tok_s:.1f}",
        f"{row.spread['tok_s']:.1%}",
        f"{row.tok_s / base.tok_s:.2f}" if base else "",
        f"{row.peak_mem_gib:.2f}",
    ]


def setup_table(rows: Sequence[VllmRow]) -> Table:
    """A line a setup: its weights, its start, and what it compiled while it should have been answering."""
    lines = []
    for setup in dict.fromkeys(row.setup for row in rows):
        alike = [row for row in rows if row.setup == setup]
        first, compiled = alike[0], sum(len(row.compiled) for row in alike)
        weights, start = f"{first.weights_gib:.3f}", f"{first.start_s:.1f}"
        lines.append([setup, str(first.tensor_parallel_size), weights, start, str(compiled)])
    note = "compiled: kernels and graphs, after the first request"
    return Table(["setup", "GPUs", "weights GiB each", "start s", "compiled"], lines, title="setups", note=note)
