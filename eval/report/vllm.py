"""A file of `bench vllm` as one table for README.md: workloads down, setups across."""

from rowint8.eval.markdown import TBD, table
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import VllmRow

_BASE = "bf16"


def vllm_table(results: Results[VllmRow] | None) -> str:
    """Time between tokens while decoding, TTFT of prompts alone, start and weights; in brackets bf16's over it."""
    if results is None:
        return TBD
    rows = results.rows
    setups = list(dict.fromkeys(row.setup for row in rows))
    workloads = dict.fromkeys(row.size for row in rows)
    lines = []
    for size in sorted(workloads, key=lambda size: (size[2] == 1, size)):
        alike = [row for row in rows if row.size == size]
        batch, prompt, output = size
        times = {row.setup: row.ttft_ms if output == 1 else row.itl_ms for row in alike}
        what = f"{batch} x {prompt}: {'TTFT' if output == 1 else 'ITL'} ms"
        lines.append([what, *(_cell(times.get(name), times.get(_BASE)) for name in setups)])
    first = {name: next(row for row in rows if row.setup == name) for name in setups}
    lines.append(["weights GiB", *(f"{row.weights_gib:.2f}" for row in first.values())])
    lines.append(["engine start s", *(f"{row.start_s:.0f}" for row in first.values())])
    environment = results.environment
    head = f"{environment.device}, vLLM {environment.vllm}, torch {environment.torch}; "
    head += f"medians of {rows[0].repeats}, in brackets {_BASE}'s time / this one's.\n\n"
    return head + table(["requests x prompt tokens", *setups], lines)


def _cell(time: float | None, base: float | None) -> str:
    if time is None:
        return TBD
    return f"{time:.2f}" + (f" ({base / time:.2f})" if base else "")
