"""Rows of engines as tables: the same task for every setup, tokens a second, and the small engine's ladder."""

from collections.abc import Sequence
from itertools import groupby

from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import EngineRow, Generation, Measured
from rowint8.eval.tables import Column, Table

COURSE = ("setup", "batch", "prompt tokens", "output tokens", "TTFT ms", "tok/s", "peak memory GiB", "notes")

_COLUMNS = [
    Column("requests x prompt x output tokens", "workload"),
    *("setup", "TTFT ms", "TPOT ms", "tok/s", "x first", "x vLLM's", "peak GiB"),
    Column("host ms a step", "host ms"),
    Column("KV waste", "waste"),
]
_NOTE = (
    "workload: requests x prompt x output tokens; x first: tok/s over the workload's first setup; x vLLM's: over vLLM "
    "with the same weights; host ms: the host's own work in the median step (on the CPU the computation too); waste: "
    "empty part of the KV blocks in use"
)


def ladder_table(rows: Sequence[EngineRow]) -> Table:
    """A line a workload and setup, the setups of a workload together."""
    lines = []
    ordered = sorted(rows, key=lambda row: row.size)  # stable: setups stay in their order
    for size, group in groupby(ordered, key=lambda row: row.size):
        alike = list(group)
        vllm = {row.setup: row.tok_s for row in alike if row.engine == "vllm"}
        for row in alike:
            form = "rowint8-a8" if row.setup == "int8-a8" else "rowint8" if row.setup.startswith("int8") else "bf16"
            peer = vllm.get(form)
            lines.append(
                [
                    " x ".join(map(str, size)) if row is alike[0] else "",
                    row.setup if row.engine == "baseline" else f"{row.engine} {row.setup}",
                    f"{row.ttft_ms:.1f}",
                    _optional(row.tpot_ms),
                    f"{row.tok_s:.1f}",
                    f"{row.tok_s / alike[0].tok_s:.2f}",
                    _optional(row.tok_s / peer if peer and row.engine == "baseline" else None),
                    f"{row.peak_mem_gib:.2f}",
                    _optional(row.host_ms),
                    "-" if row.kv_waste is None else f"{row.kv_waste:.1%}",
                ]
            )
    return Table(_COLUMNS, lines, title="engines", note=_NOTE, words=2, grouped=True)


def course_table(rows: Sequence[Generation]) -> Table:
    """A line a workload and setup, the setups of a workload together, each beside bf16 in the same engine."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    return Table(COURSE, [_course_cells(row, rows) for row in sorted(rows, key=lambda row: sizes.index(row.size))])


def _course_cells(row: Generation, rows: Sequence[Generation]) -> list[str]:
    base = bf16_of(row, rows)
    notes = [f"TPOT {spread_text(row, 'tpot_ms', row.tpot_ms, 2)} ms"] if row.tpot_ms else []
    notes += [f"{row.tok_s / base.tok_s:.2f} x {base.setup}"] if base else []
    notes.append(f"weights {row.weights_gib:.2f} GiB")
    times = [spread_text(row, "ttft_ms", row.ttft_ms, 1), spread_text(row, "tok_s", row.tok_s, 1)]
    return [name_of(row), *map(str, row.size), *times, f"{row.peak_mem_gib:.2f}", ", ".join(notes)]


def bf16_of(row: Generation, rows: Sequence[Generation]) -> Generation | None:
    """The row of bf16 on the same task in the same engine, with CUDA graphs where there is one; None of bf16 itself."""
    alike = [each for each in rows if (each.engine, each.size) == (row.engine, row.size)]
    found = sorted(
        (each for each in alike if each.setup.startswith("bf16")), key=lambda each: each.setup != "bf16-graph"
    )
    return None if row.setup.startswith("bf16") or not found else found[0]


def name_of(row: Generation) -> str:
    """Engine and setup, such as "vllm rowint8"."""
    return f"{row.engine} {row.setup}"


def spread_text(row: Generation, metric: str, value: float, digits: int) -> str:
    """A number with half the range of the repeats, where there were some."""
    half = row.spread[metric] / 2 * value if isinstance(row, Measured) and metric in row.spread else None
    return f"{value:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def pp_tg_table(rows: Sequence[Generation]) -> Table:
    """In the manner of llama-bench: prompt tokens a second until the first token (pp), and batch / TPOT (tg)."""
    lines = []
    for row in rows:
        start = [name_of(row), f"{row.weights_gib:.2f}", str(row.batch)]
        if row.output_tokens == 1 or row.batch == 1:
            rate = row.prompt_tokens * (row.tok_s if row.output_tokens == 1 else 1000 / row.ttft_ms)
            metric = "tok_s" if row.output_tokens == 1 else "ttft_ms"
            lines.append([*start, f"pp{row.prompt_tokens}", spread_text(row, metric, rate, 0)])
        if row.tpot_ms and row.output_tokens > 2:
            rate = spread_text(row, "tpot_ms", row.batch * 1000 / row.tpot_ms, 0)
            lines.append([*start, f"tg{row.output_tokens}", rate])
    return Table(["setup", "weights GiB", "batch", "test", "t/s"], lines)


def engine_part(results: Results[EngineRow]) -> str:
    """The table in Markdown, with where it was measured."""
    environment = results.environment
    head = f"{environment.device}, vLLM {environment.vllm or 'not installed'}, torch {environment.torch}.\n\n"
    return head + ladder_table(results.rows).markdown()


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
