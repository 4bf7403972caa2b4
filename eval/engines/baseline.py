"""`bench engine`: the small engine, rung by rung, and another engine beside it on the same requests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rowint8.eval.engines.speed import GPU_MEMORY_UTILIZATION, MAX_BATCHED_TOKENS, Requests, measured_fields
from rowint8.eval.results.schema import EngineName, EngineRow


def row_setup(name: str) -> str:
    """What a setup is called in a row, which has the engine's name besides."""
    return name.removeprefix("vllm-").removeprefix("transformers-")


def answerable(engine: EngineName, workloads: Sequence[Requests]) -> list[Requests]:
    """The workloads that the engine can take: transformers' `generate` takes requests of one size only."""
    return [each for each in workloads if engine != "transformers" or not each.once]


def engine_arguments(engine: EngineName, folder: Path, dummy: bool, workloads: Sequence[Requests]) -> dict[str, Any]:
    """What every setup of an engine is told: context, sequences and tokens at a time, share of the GPU's memory."""
    context = max(each.longest for each in workloads)
    sequences = max(len(each.prompts) for each in workloads)
    common = {"model": str(folder), "dtype": "bfloat16"}
    if engine == "baseline":
        limits = {"max_context": context, "max_seqs": sequences, "max_batch_tokens": MAX_BATCHED_TOKENS}
        return {**common, **limits, "memory_fraction": GPU_MEMORY_UTILIZATION}
    if engine == "transformers":
        return common
    limits = {"max_model_len": context, "max_num_seqs": sequences, "max_num_batched_tokens": MAX_BATCHED_TOKENS}
    loading = {"load_format": "dummy"} if dummy else {}
    return {**common, **limits, **loading, "gpu_memory_utilization": GPU_MEMORY_UTILIZATION}


def setup_rows(name: str, engine: EngineName, workloads: Sequence[Requests], result: dict[str, Any]) -> list[EngineRow]:
    """The rows of one setup from what `speed.run_setup` returned.

    Raises:
        EvalError: a request has not as many tokens as asked for.
    """
    pairs = zip(workloads, result["runs"], strict=True)
    return [_row(name, engine, requests, run, result["start_s"]) for requests, run in pairs]


def _row(name: str, engine: EngineName, requests: Requests, run: dict[str, Any], start_s: float) -> EngineRow:
    last, ours = run["repeats"][-1], engine == "baseline"
    return EngineRow(
        engine=engine,
        setup=row_setup(name),
        **measured_fields(requests, run, start_s),
        host_ms=last["host_s"] * 1000 if ours else None,
        kv_waste=last["kv_waste"] if ours else None,
        attention=last["attention"] if ours else None,
    )
