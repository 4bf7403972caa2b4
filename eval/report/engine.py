"""A file of `bench engine` as one table for docs/engine.md: workloads and setups down, what was measured across."""

from itertools import groupby

from rowint8.eval.markdown import TBD, table
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import EngineRow

_HEADING = ["requests x prompt x output tokens", "setup", "TTFT ms", "TPOT ms", "tok/s", "x first", "x vLLM's"]
_HEADING += ["peak GiB", "host ms a step", "KV waste"]


def engine_table(results: Results[EngineRow] | None) -> str:
    """The ladder, workload by workload; tok/s also over that of the first setup, and of vLLM with the same weights."""
    if results is None:
        return TBD
    environment, lines = results.environment, []
    rows = sorted(results.rows, key=lambda row: row.size)  # stable: setups stay in their order
    for size, group in groupby(rows, key=lambda row: row.size):
        alike = list(group)
        vllm = {row.setup: row.tok_s for row in alike if row.engine == "vllm"}
        for row in alike:
            peer = vllm.get("rowint8" if row.setup.startswith("int8") else "bf16")
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
    head = f"{environment.device}, vLLM {environment.vllm or 'not installed'}, torch {environment.torch}.\n\n"
    return head + table(_HEADING, lines)


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
