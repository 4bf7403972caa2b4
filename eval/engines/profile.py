"""Where a decode step's time goes, in the small engine and in vLLM beside it; each setup in a process of its own.

A step is one token for each of `batch` requests, all of which decode. Its time comes from steps without the profiler,
its parts (see `parts`) from as many steps with torch's. Beside them stands what no engine can go below: reading the
weights, and the keys and values, once at the rate that this card reaches (`kernels.timing.measure_ceilings`).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.eval.engines.baseline import engine_arguments, row_setup
from rowint8.eval.engines.profile_worker import WARM_TOKENS, measure
from rowint8.eval.engines.setups import Setup, ladder
from rowint8.eval.engines.speed import MAX_BATCHED_TOKENS, Requests, check_tokens, random_prompts
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import is_count
from rowint8.eval.processes import run_worker, vllm_environment
from rowint8.eval.results.schema import EngineName, ProfileRow

SAMPLINGS: dict[str, dict[str, float]] = {"greedy": {}, "top-p": {"temperature": 1.0, "top_p": 0.95}}
"""Name to arguments of both engines' `SamplingParams`."""


def setups(gpu: bool) -> dict[str, Setup]:
    """Those of `bench engine` whose engine can be stepped. Graphs for prompts change no decode step."""
    return {
        name: setup
        for name, setup in ladder(gpu).items()
        if setup.engine != "transformers" and "prompt_graph_tokens" not in setup.arguments
    }


def parse_batches(text: str, prompt_tokens: int, steps: int) -> list[int]:
    """Reads "1,32".

    Raises:
        EvalError: it is something else, or more tokens than an engine takes.
    """
    if not all(map(is_count, text.split(","))):
        raise EvalError(f"--batches is {text}; accepted are whole numbers above 0 with commas between, such as 1,32")
    batches = [int(part) for part in text.split(",")]
    check_tokens(max(batches), prompt_tokens + steps, f"--batches has {max(batches)} prompts of {prompt_tokens} tokens")
    return batches


def parse_samplings(text: str) -> list[str]:
    """Reads "greedy,top-p".

    Raises:
        EvalError: it is something else.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in SAMPLINGS]:
        raise EvalError(f"--sampling has {', '.join(unknown)}; accepted are {', '.join(SAMPLINGS)}")
    return names


def run_setup(
    name: str,
    setup: Setup,
    folder: Path,
    dummy: bool,
    batches: Sequence[int],
    samplings: Sequence[str],
    prompt_tokens: int,
    steps: int,
) -> list[ProfileRow]:
    """Profiles one setup in a new process; a row for each batch and way of sampling.

    Raises:
        EvalError: it failed; the message holds the end of its log.
    """
    model = ModelConfig.from_folder(folder)
    cases = list(itertools.product(batches, samplings))
    requests = [_requests(batch, prompt_tokens, steps, model.vocab_size) for batch, _ in cases]
    runs = [
        {"prompts": each.prompts, "tokens": each.outputs[0], "sampling": SAMPLINGS[sampling]}
        for each, (_, sampling) in zip(requests, cases, strict=True)
    ]
    arguments = {**engine_arguments(setup.engine, folder, dummy, requests), **setup.arguments}
    request = {"engine": setup.engine, "arguments": arguments, "dummy": dummy, "steps": steps, "runs": runs}
    in_one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **vllm_environment()}
    result = run_worker(measure, request, in_one_process)
    return [
        profile_row(name, setup.engine, model, *case, steps, run, result)
        for case, run in zip(cases, result["runs"], strict=True)
    ]


def _requests(batch: int, prompt_tokens: int, steps: int, vocab_size: int) -> Requests:
    """Prompts, and enough tokens after them that none ends before the last step."""
    prefill_steps = -(-batch * prompt_tokens // MAX_BATCHED_TOKENS)
    tokens = 2 * prefill_steps + WARM_TOKENS + steps + 4
    return Requests(random_prompts(batch, prompt_tokens, vocab_size), [tokens] * batch)


def profile_row(
    name: str,
    engine: EngineName,
    model: ModelConfig,
    batch: int,
    sampling: str,
    steps: int,
    run: dict[str, Any],
    result: dict[str, Any],
) -> ProfileRow:
    """The row of one run of `profile_worker.measure`, whose arithmetic is in bf16."""
    import torch

    embedding = 0 if model.tie_word_embeddings else 2 * model.vocab_size * model.hidden_size
    weight_bytes = result["weights"] - embedding
    kv_bytes = batch * run["context"] * KvCache.bytes_per_token(model, torch.bfloat16)
    rate = result["read_tb_s"]
    limits = {"weights": weight_bytes / rate / 1e9, "kv": kv_bytes / rate / 1e9} if rate else None
    return ProfileRow(
        engine=engine,
        setup=row_setup(name),
        sampling=sampling,
        batch=batch,
        steps=steps,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        limit_ms=limits,
        attention=result["attention"],
        **run,
    )
