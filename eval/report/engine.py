"""Rows of engines as tables: the same task for every setup, tokens a second, and the small engine's ladder."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rowint8.eval.markdown import TBD
from rowint8.eval.models import DEFAULT_MODEL, MODELS, embedding_bytes
from rowint8.eval.results.files import Environment, Results
from rowint8.eval.results.schema import GIB, EngineRow, Generation, Measured
from rowint8.eval.tables import Column, Table, model_of

PROMPT_ALONE = 2
"""With at most this many output tokens a row is of its prompts."""
COURSE_BATCHES = (1, 32)
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
            peer = vllm.get(weights_of(row.setup))
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


def weights_of(setup: str) -> str:
    """vLLM's setup with the weights of one of the small engine's."""
    return "rowint8-a8" if setup.startswith("int8-a8") else "rowint8" if setup.startswith("int8") else "bf16"


def spread_text(row: Generation, metric: str, value: float, digits: int) -> str:
    """A number with half the range of the repeats, where there were some."""
    half = row.spread[metric] / 2 * value if isinstance(row, Measured) and metric in row.spread else None
    return f"{value:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def rates_table(rows: Sequence[Generation]) -> Table:
    """In the manner of llama-bench, a line a test and a column a setup: tokens a second, in brackets over bf16's.

    pp: prompt tokens / time until the last request's first token. tg: batch / TPOT, so without the prompts.
    """
    setups = list(dict.fromkeys(map(name_of, rows)))
    lines = []
    for size in sorted({row.size for row in rows}, key=lambda size: (size[2] <= PROMPT_ALONE, size)):
        alike = {name_of(row): row for row in rows if row.size == size}
        batch, prompt, output = size
        test = f"pp{prompt}" if output <= PROMPT_ALONE else f"tg{output}"
        cells = [_rate(alike[name], rows) if name in alike else "" for name in setups]
        lines.append([f"{test}, {batch} at once", *cells])
    for what, field in (("weights GiB", "weights_gib"), ("peak GiB", "peak_mem_gib")):
        most = [max(getattr(row, field) for row in rows if name_of(row) == name) for name in setups]
        lines.append([what, *(f"{gib:.2f}" for gib in most)])
    return Table(["t/s", *setups], lines)


def _rate(row: Generation, rows: Sequence[Generation]) -> str:
    base = bf16_of(row, rows)
    over = f" ({_speed(row)[1] / _speed(base)[1]:.2f})" if base else ""
    metric, speed = _speed(row)
    return spread_text(row, metric, speed, 0 if speed >= 1000 else 1) + over


def _speed(row: Generation) -> tuple[str, float]:
    """The metric that was measured, and what it says in tokens a second."""
    if row.tpot_ms and row.output_tokens > PROMPT_ALONE:
        return "tpot_ms", row.batch * 1000 / row.tpot_ms
    if row.output_tokens == 1:
        return "tok_s", row.prompt_tokens * row.tok_s
    return "ttft_ms", row.batch * row.prompt_tokens * 1000 / row.ttft_ms


def where_line(results: Results) -> str:
    """Card, versions, commit and model of a file of engines."""
    where = results.environment
    versions = {"vLLM": where.vllm, "torch": where.torch}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{where.device}, {told}, commit {commit_of(where)}; {model_of(results.command)}."


def commit_of(where: Environment) -> str:
    """Its first nine digits, and whether the code differed from it."""
    return f"{(where.git_commit or 'unknown')[:9]}{' + changes' if where.git_dirty else ''}"


def rates_part(results: Results[Generation]) -> str:
    """`rates_table` in Markdown, with where and of what."""
    repeats = getattr(results.rows[0], "repeats", 1)
    note = f"Medians of {repeats} ± half their range, " if repeats > 1 else ""
    note += "in brackets over bf16's in the same engine. pp: prompt tokens, tg: tokens written, a second."
    return f"{where_line(results)} {note}\n\n{rates_table(results.rows).markdown()}"


def course_part(results: Results[Generation]) -> str:
    """`course_table` of decoding with one request and with 32, in Markdown."""
    rows = [row for row in results.rows if row.output_tokens > PROMPT_ALONE and row.batch in COURSE_BATCHES]
    note = "baseline: the small engine of this repository. Medians ± half the range of the repeats."
    return f"{where_line(results)} {note}\n\n{course_table(rows).markdown()}" if rows else ""


def gaps_table(files: Sequence[tuple[str, Results[Generation]]], rates: Mapping[str, float]) -> str:
    """One request: time a token beside the least to read what a step reads, and beside vLLM's with the same weights.

    Args:
        files: name and content, of Llama-3.1-8B's shape.
        rates: device to its read ceiling, TB/s.
    """
    lines = []
    for stem, results in files:
        rows = [row for row in results.rows if row.batch == 1 and row.output_tokens > PROMPT_ALONE]
        rate = rates.get(results.environment.device)
        lines += [_gap_cells(stem, row, rows, rate) for row in rows if rate]
    headings = ["file", "setup", "TPOT ms", "reading the weights, ms", "x that", "x vLLM's"]
    return Table(headings, lines).markdown() if lines else TBD


def _gap_cells(stem: str, row: Generation, rows: Sequence[Generation], read_tb_s: float) -> list[str]:
    tpot = row.tpot_ms or 0.0
    least = (row.weights_gib * GIB - embedding_bytes(MODELS[DEFAULT_MODEL])) / read_tb_s / 1e9
    peer = f"vllm {weights_of(row.setup)}"
    vllm = next((other.tpot_ms for other in rows if name_of(other) == peer), None) if row.engine == "baseline" else None
    beside = f"{tpot / vllm:.2f}" if vllm else "-"
    return [stem, name_of(row), f"{tpot:.2f}", f"{least:.2f}", f"{tpot / least:.2f}", beside]


def engine_part(results: Results[EngineRow]) -> str:
    """The table in Markdown, with where it was measured."""
    return f"{where_line(results)}\n\n" + ladder_table(results.rows).markdown()


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
