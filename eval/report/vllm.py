"""Rows of `bench vllm` as tables: every number for the console, and what each setup costs for README.md."""

import statistics
from collections.abc import Sequence

from rowint8.eval.markdown import TBD, table
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import FidelityRow, ServeRow, VllmRow
from rowint8.eval.tables import Table, model_of

BASE = "bf16"
"""The setup that ratios are taken to."""


_COLUMNS = {"bf16": "bf16", "rowint8": "rowint8", "rowint8-a8": "rowint8-a8", "fp8_per_channel": "FP8 per channel"}
"""Setups of the table of costs, and their headings."""
_SAME_WEIGHTS = {"bf16": ("unquantized",), "fp8_per_channel": ("fp8-a8",)}
_SAME_SERVED = {"fp8_per_channel": ("fp8_per_channel", "fp8")}
_DECODING = ((1, "one user decodes, tok/s"), (128, "128 users decode, tok/s of all"))
_PROMPTS = (((1, 2048), "a prompt of 2048 tokens, ms"),)
Newest = tuple[str, Results] | None
"""Name and content of a file."""


def cost_table(speed: Newest, load: Newest, fidelity: Newest) -> str:
    """What each setup takes: a line for memory, decoding, prompts, waiting under load and quality, with the file."""
    lines = [*_speed_lines(*speed)] if speed else []
    lines += [_load_line(*load)] if load else []
    lines += [_fidelity_line(*fidelity)] if fidelity else []
    return table(["", *_COLUMNS.values(), "measured on"], lines) if lines else TBD


def _speed_lines(stem: str, results: Results[VllmRow]) -> list[list[str]]:
    rows = {(row.setup, row.batch, row.prompt_tokens, row.output_tokens == 1): row for row in results.rows}
    first = {row.setup: row for row in reversed(results.rows)}
    of = _source(stem, results)
    lines = [["weights, GiB", *(f"{first[name].weights_gib:.2f}" if name in first else "-" for name in _COLUMNS), of]]
    for batch, what in _DECODING:
        found = [rows.get((name, batch, 128, False)) for name in _COLUMNS]
        lines.append(
            [what, *(f"{batch * 1000 / row.tpot_ms:.0f}" if row and row.tpot_ms else "-" for row in found), of]
        )
    for (batch, prompt), what in _PROMPTS:
        found = [rows.get((name, batch, prompt, True)) for name in _COLUMNS]
        lines.append([what, *(f"{row.ttft_ms:.0f}" if row else "-" for row in found), of])
    return lines


def _load_line(stem: str, results: Results[ServeRow]) -> list[str]:
    """The slowest percent of first tokens at the highest rate, the median of the runs."""
    rate = max(row.request_rate for row in results.rows)
    cells = []
    for name in _COLUMNS:
        runs = [
            row for row in results.rows if row.request_rate == rate and row.setup in _SAME_SERVED.get(name, (name,))
        ]
        cells.append(f"{statistics.median(row.ttft_ms['p99'] for row in runs):.0f}" if runs else "-")
    return [f"p99 TTFT at {rate:g} requests a second, ms", *cells, _source(stem, results)]


def _fidelity_line(stem: str, results: Results[FidelityRow]) -> list[str]:
    found = {row.setup: row for row in results.rows}
    rows = [
        next((found[each] for each in _SAME_WEIGHTS.get(name, (name,)) if each in found), None) for name in _COLUMNS
    ]
    cells = [f"{1000 * row.kl_mean:.1f}" if row else "-" for row in rows]
    return ["KL from the original, thousandths of a nat", *cells, _source(stem, results)]


def _source(stem: str, results: Results) -> str:
    what = model_of(results.command).removeprefix("random weights of ")
    vllm = f", vLLM {results.environment.vllm}" if isinstance(results.rows[0], VllmRow | ServeRow) else ""
    return f"[{what}](results/{stem}.json){vllm}"


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
