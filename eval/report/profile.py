"""Rows of `rowint8 profile` as tables: the parts of a step, and a number for each suspect."""

from collections.abc import Sequence

from rich.table import Table

from rowint8.eval import markdown
from rowint8.eval.console import compact_table
from rowint8.eval.results.schema import PARTS, ProfileRow

_COLUMNS = 4
_CASE = ["setup", "batch", "context"]
_PARTS = [*_CASE, "step ms", *PARTS, "launches"]
_SUSPECTS = [*_CASE, "matmul / weights", "attention / KV", "step / limit", "scheduler", "host", "wait", "detokenizing"]
_SUSPECTS += ["served", "padding", "KV waste"]
PARTS_NOTE = (
    "parts: ms a step; gaps: nothing ran (on the CPU: Python; there the profiler slows operators down, and the parts "
    "add up to the profiled step). launches: kernels, on the CPU operators"
)
SUSPECTS_NOTE = (
    "x / y: time over the least time to read y once (limit: both). scheduler, host (with launching and recording), "
    "wait (for the device) and detokenizing (a part of host): ms a step on the host; served: a step's ms where "
    "each request is a coroutine; padding: rows of the CUDA graph, KV waste: slots of the blocks, that nobody uses"
)


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
    """Parts and suspects below one another, a column a row of the file, few enough in a table for 80 columns."""
    tables = []
    for start in range(0, len(rows), _COLUMNS):
        some = rows[start : start + _COLUMNS]
        table = compact_table("a decode step", f"{PARTS_NOTE}; {SUSPECTS_NOTE}")
        table.add_column("batch x context")
        for row in some:
            name, batch, context = _case(row)
            table.add_column(f"{name}\n{batch} x {context}", justify="right")
        for heading, cells in ((_PARTS, _parts), (_SUSPECTS, _suspects)):
            for name, *values in list(zip(heading, *map(cells, some), strict=True))[len(_CASE) :]:
                if set(values) != {"-"}:
                    table.add_row(name, *values)
            table.add_section()
        tables.append(table)
    return tables


def parts_table(rows: Sequence[ProfileRow]) -> str:
    """The parts of each row's step in Markdown, with what the columns mean."""
    return f"{markdown.table(_PARTS, map(_parts, rows))}\n{PARTS_NOTE}.\n"


def profile_section(rows: Sequence[ProfileRow]) -> str:
    """Parts and suspects in Markdown, with the longest kernels of each row behind a click."""
    suspects = markdown.table(_SUSPECTS, map(_suspects, rows))
    lines = [[*_case(row), f"`{name}`", f"{ms:.3f}"] for row in rows for name, ms in row.longest_ms.items()]
    longest = markdown.folded("Longest kernels", markdown.table([*_CASE, "kernel", "ms a step"], lines))
    return f"{parts_table(rows)}\n{suspects}\n{SUSPECTS_NOTE}.\n\n{longest}"
