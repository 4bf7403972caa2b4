"""Rows of `bench engine` as a table: workloads and setups down, what was measured across."""

from collections.abc import Sequence
from itertools import groupby

from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import EngineRow
from rowint8.eval.tables import Column, Table

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


def engine_part(results: Results[EngineRow]) -> str:
    """The table in Markdown, with where it was measured."""
    environment = results.environment
    head = f"{environment.device}, vLLM {environment.vllm or 'not installed'}, torch {environment.torch}.\n\n"
    return head + ladder_table(results.rows).markdown()


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
