"""`bench vllm`: speed and memory of whole vLLM engines, rowint8 beside bf16 and what else vLLM offers in 8 bits."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rowint8.eval.engines.setups import SETUPS
from rowint8.eval.engines.speed import (
    GPU_MEMORY_UTILIZATION,
    MAX_BATCHED_TOKENS,
    Requests,
    Workload,
    measured_fields,
    run_setup,
)
from rowint8.eval.results.schema import VllmRow

SETUP_TIMEOUT = 1200.0
"""Seconds for one setup, its start included."""


def llm_arguments(
    model: Path,
    workloads: Sequence[Workload],
    tensor_parallel_size: int,
    eager: bool,
    expert_parallel: bool = False,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that all setups share. CUDA graphs are captured for the measured batches only."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": max(workload.prompt_tokens + workload.output_tokens for workload in workloads),
        "max_num_seqs": max(workload.batch for workload in workloads),
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
        "tensor_parallel_size": tensor_parallel_size,
        "enforce_eager": eager,
        "enable_expert_parallel": expert_parallel,
    }
    decoding = {workload.batch for workload in workloads if workload.output_tokens > 1}
    if decoding and not eager:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sorted(decoding)}
    return arguments


def measure_setup(
    setup: str, arguments: Mapping[str, Any], workloads: Sequence[Requests], repeats: int, dummy: bool
) -> tuple[list[VllmRow], str]:
    """The rows of one of SETUPS, measured in a new process, and a line on it.

    Args:
        arguments: of `vllm.LLM`, besides the setup's own.
        dummy: the weights are random.

    Raises:
        EvalError: it failed or took too long.
    """
    start = time.monotonic()
    result = run_setup(SETUPS[setup], arguments, workloads, repeats, dummy, SETUP_TIMEOUT)
    rows = setup_rows(setup, workloads, result)
    return rows, summary(rows, time.monotonic() - start)


def setup_rows(setup: str, workloads: Sequence[Requests], result: dict[str, Any]) -> list[VllmRow]:
    """The rows of one setup from what `speed.run_setup` returned.

    Raises:
        EvalError: a request has not as many tokens as asked for.
    """
    pairs = zip(workloads, result["runs"], strict=True)
    return [_row(setup, requests, run, result["start_s"]) for requests, run in pairs]


def _row(setup: str, requests: Requests, run: dict[str, Any], start_s: float) -> VllmRow:
    return VllmRow(
        engine="vllm",
        setup=setup,
        **measured_fields(requests, run, start_s),
        tensor_parallel_size=len(run["ranks"]),
        compiled=tuple(name for rank in run["ranks"] for name in rank["compiled"]),
    )


def summary(rows: Sequence[VllmRow], seconds: float) -> str:
    """A line on one setup that is done, `seconds` after it was begun."""
    compiled = Counter(name for row in rows for name in row.compiled)
    names = ", ".join(f"{count} x {name}" for name, count in compiled.items()) or "nothing"
    first = rows[0]
    return (
        f"{first.setup}: {seconds:.0f} s, of which engine start {first.start_s:.0f}; compiled while answering: {names}"
    )
