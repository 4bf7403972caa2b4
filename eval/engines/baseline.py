"""Speed and memory of the small engine, rung by rung, and of another engine beside it on the same requests.

Every setup runs in a process of its own (`bench_engine_worker`). The ladder: plain torch, torch.compile, CUDA graphs,
INT8 weights, INT8 with SwiGLU and norms fused; on GPUs each rung keeps what the one before it has.
Requests of a workload are handed in together and decoded greedily, with nothing cached. Each workload runs once
unmeasured, then medians count; the throughput workload, which is long and comes last, runs just once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowint8.eval.engines import baseline_worker
from rowint8.eval.engines.repeats import measured_fields
from rowint8.eval.engines.vllm import GPU_MEMORY_UTILIZATION, MAX_BATCHED_TOKENS, Workload
from rowint8.eval.engines.vllm_worker import random_prompts
from rowint8.eval.processes import run_worker, vllm_environment
from rowint8.eval.results.schema import EngineName, EngineRow

DEFAULT_WORKLOADS = "1x128x128,8x128x128,32x128x128"
THROUGHPUT_SEQUENCES = 256
THROUGHPUT_TOKENS = (100, 1024)
"""Least and most tokens of a prompt, and of an output, in the throughput workload."""

_INT8 = {"quantization": "rowint8"}


@dataclass(frozen=True)
class Setup:
    """One way of running the model in one engine."""

    engine: EngineName
    arguments: dict[str, Any]
    """Of `EngineConfig`, or of `vllm.LLM`."""


def setups(gpu: bool) -> dict[str, Setup]:
    """The rungs in order, then vLLM's. On the CPU there are no graphs, INT8 is not compiled, which gains nothing there,
    and in vLLM's place stands Hugging Face's `generate`, which takes requests of one size only: no throughput workload.
    """
    best = "graph" if gpu else "eager"
    fused = {**_INT8, "mode": best, "fused": True}
    rungs = {
        "bf16-eager": {"mode": "eager"},
        "bf16-compile": {"mode": "compile"},
        "bf16-graph": {"mode": "graph"},
        "int8": {**_INT8, "mode": best, "fused": False},
        "int8-fused": fused,
        "int8-fused-decode-graphs": {**fused, "prompt_graph_tokens": 0},
        "int8-fused-lm-head": {**fused, "int8_lm_head": True},
    }
    found = {name: Setup("baseline", arguments) for name, arguments in rungs.items() if gpu or "graph" not in name}
    if gpu:
        return found | {"vllm-bf16": Setup("vllm", {}), "vllm-rowint8": Setup("vllm", dict(_INT8))}
    return found | {"transformers-bf16": Setup("transformers", {})}


def row_setup(name: str) -> str:
    """What a setup is called in a row, which has the engine's name besides."""
    return name.removeprefix("vllm-").removeprefix("transformers-")


@dataclass(frozen=True)
class Requests:
    """One workload: token ids of each prompt, and how many tokens to generate after each."""

    prompts: list[list[int]]
    outputs: list[int]
    once: bool = False
    """Measured at its first run, and only then."""

    @property
    def longest(self) -> int:
        pairs = zip(self.prompts, self.outputs, strict=True)
        return max(len(prompt) + output for prompt, output in pairs)


def uniform_requests(workload: Workload, vocab_size: int) -> Requests:
    """The prompts that `bench vllm` uses for the same workload."""
    prompts = random_prompts(workload.batch, workload.prompt_tokens, vocab_size)
    return Requests(prompts, [workload.output_tokens] * workload.batch)


def throughput_requests(vocab_size: int, sequences: int = THROUGHPUT_SEQUENCES) -> Requests:
    """Requests of uniformly drawn lengths, the same at every call."""
    draw = random.Random(sequences)
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(*THROUGHPUT_TOKENS))] for _ in range(sequences)]
    return Requests(prompts, [draw.randint(*THROUGHPUT_TOKENS) for _ in range(sequences)], once=True)


def run_setup(setup: Setup, folder: Path, dummy: bool, workloads: Sequence[Requests], repeats: int) -> dict[str, Any]:
    """Measures one setup in a new process; what `bench_engine_worker.bench` returns.

    Raises:
        EvalError: it failed; the message holds the end of its log.
    """
    arguments = engine_arguments(setup, folder, dummy, workloads)
    measured = [_workload(each, repeats) for each in workloads]
    request = {"engine": setup.engine, "arguments": arguments, "dummy": dummy, "workloads": measured}
    return run_worker(baseline_worker.bench, request, vllm_environment())


def _workload(requests: Requests, repeats: int) -> dict[str, Any]:
    runs = {"unmeasured": 0, "repeats": 1} if requests.once else {"unmeasured": 1, "repeats": repeats}
    return {"prompts": requests.prompts, "outputs": requests.outputs, **runs}


def engine_arguments(setup: Setup, folder: Path, dummy: bool, workloads: Sequence[Requests]) -> dict[str, Any]:
    """What both engines are told alike: context, sequences and tokens at a time, share of the GPU's memory."""
    context = max(each.longest for each in workloads)
    sequences = max(len(each.prompts) for each in workloads)
    common = {"model": str(folder), "dtype": "bfloat16"}
    if setup.engine == "baseline":
        limits = {"max_context": context, "max_seqs": sequences, "max_batch_tokens": MAX_BATCHED_TOKENS}
        return {**common, **limits, "memory_fraction": GPU_MEMORY_UTILIZATION, **setup.arguments}
    if setup.engine == "transformers":
        return common
    limits = {"max_model_len": context, "max_num_seqs": sequences, "max_num_batched_tokens": MAX_BATCHED_TOKENS}
    loading = {"load_format": "dummy"} if dummy else {}
    return {**common, **limits, "gpu_memory_utilization": GPU_MEMORY_UTILIZATION, **loading, **setup.arguments}


def setup_rows(name: str, engine: EngineName, workloads: Sequence[Requests], result: dict[str, Any]) -> list[EngineRow]:
    """The rows of one setup from what its worker returned.

    Raises:
        EvalError: a request has not as many tokens as asked for.
    """
    return [_row(name, engine, requests, run, result) for requests, run in zip(workloads, result["runs"], strict=True)]


def _row(name: str, engine: EngineName, requests: Requests, run: dict[str, Any], result: dict[str, Any]) -> EngineRow:
    prompts, last, ours = [*map(len, requests.prompts)], run["repeats"][-1], engine == "baseline"
    memory = result["weights"], run["peak_mem"]
    return EngineRow(
        engine=engine,
        setup=row_setup(name),
        **measured_fields(run["repeats"], prompts, requests.outputs, *memory, result["start_s"]),
        host_ms=last["host_s"] * 1000 if ours else None,
        kv_waste=last["kv_waste"] if ours else None,
        attention=last["attention"] if ours else None,
    )
