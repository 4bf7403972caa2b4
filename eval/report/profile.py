"""Rows of `rowint8 profile` as tables: the parts of a step, and a number for each suspect."""

from collections.abc import Sequence

from rowint8.eval.report.engine import where_line
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import PARTS, ProfileRow
from rowint8.eval.tables import Table

_ROWS = 4
"""Rows beside one another on the console."""
_CASE = ["setup", "batch", "context"]
_SUSPECTS = [*_CASE, "matmul / weights", "attention / KV", "step / limit", "scheduler", "host", "wait", "detokenizing"]
_SUSPECTS += ["served", "padding", "KV waste"]
_PARTS_NOTE = (
    "parts: ms a step; gaps: nothing ran (on the CPU: Python; there the profiler slows operators down, and the parts "
    "add up to the profiled step). launches: kernels, on the CPU operators"
)
_SUSPECTS_NOTE = (
    "x / y: time over the least time to read y once (limit: both). scheduler, host (with launching and recording), "
    "wait (for the device) and detokenizing (a part of host): ms a step on the host; served: a step's ms where "
    "each request is a coroutine; padding: rows of the CUDA graph, KV waste: slots of the blocks, that nobody uses"
)


def parts_table(rows: Sequence[ProfileRow]) -> Table:
    """The parts of each row's step."""
    headings = [*_CASE, "step ms", *PARTS, "launches"]
    return Table(headings, [_parts(row) for row in rows], title="a decode step", note=_PARTS_NOTE)


def suspects_table(rows: Sequence[ProfileRow]) -> Table:
    """What may hold each row's step up."""
    return Table(_SUSPECTS, [_suspects(row) for row in rows], title="what may hold it up", note=_SUSPECTS_NOTE)


def _case(row: ProfileRow) -> list[str]:
    engine = "vLLM " if row.engine == "vllm" else ""
    sampling = "" if row.sampling == "greedy" else f", {row.sampling}"
    return [f"{engine}{row.setup}{sampling}", str(row.batch), str(row.context)]


def _parts(row: ProfileRow) -> list[str]:
    whole = sum(row.parts_ms.values())
    parts = [f"{row.parts_ms[part]:.3f} ({row.parts_ms[part] / whole:.0%})" for part in PARTS]
    return [*_case(row), f"{row.step_ms:.3f}", *parts, f"{row.launches:.0f}"]


def _suspects(row: ProfileRow) -> list[str]:
    ratios = ["-"] * 3
    if limits := row.limit_ms:
        pairs = [("matmul", "weights"), ("attention", "kv")]
        ratios = [f"{row.parts_ms[part] / limits[bytes_]:.2f}" for part, bytes_ in pairs]
        ratios.append(f"{row.step_ms / sum(limits.values()):.2f}")
    host = row.host_ms or {}
    work = sum(host[part] for part in ("schedule", "launch", "record")) if host else None
    times = [host.get("schedule"), work, host.get("wait"), host.get("detokenize"), row.served_ms]
    shares = ["-" if share is None else f"{share:.1%}" for share in (row.padding, row.kv_waste)]
    return [*_case(row), *ratios, *("-" if ms is None else f"{ms:.3f}" for ms in times), *shares]


def console_tables(rows: Sequence[ProfileRow]) -> list[Table]:
    """Parts and suspects, with a column a row of the file, few enough in a table for 80 columns."""
    some = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
    return [_turned(table(part)) for part in some for table in (parts_table, suspects_table)]


def _turned(table: Table) -> Table:
    """The table with a column for each of its lines; what no line has a number for is left out."""
    cases = [f"{setup}\n{batch} x {context}" for setup, batch, context, *_ in table.lines]
    lines = [[heading, *cells] for heading, *cells in zip(table.columns, *table.lines, strict=True)][len(_CASE) :]
    told = [line for line in lines if set(line[1:]) != {"-"}]
    return Table(["batch x context", *cases], told, table.title, table.note)


def parts_part(results: Results[ProfileRow]) -> str:
    """The parts in Markdown, with where, of what, and what the columns mean."""
    return f"{where_line(results)}\n\n{parts_table(results.rows).markdown()}\n{_PARTS_NOTE}.\n"


def profile_section(results: Results[ProfileRow]) -> str:
    """Parts and suspects in Markdown; the file has the longest kernels too."""
    return f"{parts_part(results)}\n{suspects_table(results.rows).markdown()}\n{_SUSPECTS_NOTE}.\n"
