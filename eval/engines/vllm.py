"""Speed and memory of whole vLLM engines: rowint8 beside bf16 and what else vLLM offers in 8 bits.

Every setup runs in a process of its own (`bench_vllm_worker`), so that it has the GPU to itself; one engine serves all
of its workloads. Requests of a workload are handed in together and decoded greedily, without prefix caching; each
workload runs once unmeasured. What the numbers mean is defined in `baseline_engine.metrics`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowint8.eval.engines import vllm_worker
from rowint8.eval.engines.repeats import measured_fields
from rowint8.eval.engines.setups import Setup
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import is_count
from rowint8.eval.processes import run_worker, vllm_environment
from rowint8.eval.results.schema import VllmRow

DEFAULT_WORKLOADS = "1x128x128,8x128x128,32x128x128,128x128x128,8x1024x1,1x2048x1"
MAX_BATCHED_TOKENS = 8192
GPU_MEMORY_UTILIZATION = 0.9
SETUP_TIMEOUT = 1200.0
"""Seconds for one setup, its start included."""


@dataclass(frozen=True)
class Workload:
    """`batch` requests of the same size, handed in together."""

    batch: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}x{self.output_tokens}"


def parse_workloads(text: str) -> list[Workload]:
    """Reads "1x128x128,8x1024x1": batch, prompt tokens and output tokens of each.

    Raises:
        EvalError: it is something else.
    """
    parts = [part.split("x") for part in text.split(",")]
    if not all(len(part) == 3 and all(map(is_count, part)) for part in parts):
        raise EvalError(f"--workloads is {text}; accepted are BATCHxPROMPTxOUTPUT, such as {DEFAULT_WORKLOADS}")
    return [Workload(*map(int, part)) for part in parts]


def llm_arguments(model: Path, workloads: Sequence[Workload], tensor_parallel_size: int, eager: bool) -> dict[str, Any]:
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
    }
    decoding = {workload.batch for workload in workloads if workload.output_tokens > 1}
    if decoding and not eager:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sorted(decoding)}
    return arguments


def run_setup(setup: Setup, llm: dict[str, Any], workloads: Sequence[Workload], repeats: int) -> dict[str, Any]:
    """Measures one setup in a new process; returns what `bench_vllm_worker.bench` does.

    Raises:
        EvalError: the setup failed or took too long; the message holds the first error and the end of its log.
    """
    sizes = [[workload.batch, workload.prompt_tokens, workload.output_tokens] for workload in workloads]
    request = {"llm": {**llm, **setup.llm}, "workloads": sizes, "repeats": repeats}
    # On the CPU all cores, as nothing is served. The engine core has a process of its own, as everywhere in vLLM.
    ranks = llm.get("tensor_parallel_size", 1)
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **vllm_environment(ranks), **setup.env}
    return run_worker(vllm_worker.bench, request, environment, SETUP_TIMEOUT)


def setup_rows(setup: str, workloads: Sequence[Workload], result: dict[str, Any], ranks: int) -> list[VllmRow]:
    """The rows of one setup from what its worker returned.

    Raises:
        EvalError: a request has not as many tokens as asked for.
    """
    return [
        _row(setup, workload, run, result["start_s"], ranks)
        for workload, run in zip(workloads, result["runs"], strict=True)
    ]


def _row(setup: str, workload: Workload, run: dict[str, Any], start_s: float, ranks: int) -> VllmRow:
    prompts, outputs = [workload.prompt_tokens] * workload.batch, [workload.output_tokens] * workload.batch
    weights = max(rank["weights"] for rank in run["ranks"])
    peak = max(rank["peak_mem"] for rank in run["ranks"])
    return VllmRow(
        engine="vllm",
        setup=setup,
        **measured_fields(run["repeats"], prompts, outputs, weights, peak, start_s),
        tensor_parallel_size=ranks,
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
