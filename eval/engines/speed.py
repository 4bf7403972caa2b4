"""Requests that an engine gets all at once, and how fast a setup answers them in a process of its own.

One engine serves all workloads of its setup, decodes greedily and caches nothing. Each workload runs once unmeasured,
then medians count. What the numbers mean is defined in `baseline_engine.metrics`.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rowint8.eval.engines import speed_worker
from rowint8.eval.engines.setups import Setup
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import is_count
from rowint8.eval.processes import run_worker, vllm_environment

VLLM_WORKLOADS = (
    "1x128x128,8x128x128,32x128x128,128x128x128,256x128x128,8x1024x1,1x256x1,1x640x1,1x1100x1,1x2048x1,1x3000x1"
)
ENGINE_WORKLOADS = "1x128x128,8x128x128,32x128x128"
THROUGHPUT_SEQUENCES = 256
THROUGHPUT_TOKENS = (100, 1024)
"""Least and most tokens of a prompt, and of an output, in the throughput workload."""
MAX_BATCHED_TOKENS = 8192
"""Tokens that every engine computes in a step, at most."""
GPU_MEMORY_UTILIZATION = 0.9
MOST_TOKENS, MOST_REQUESTS = 2**24, 2**16
"""Tokens of all requests that are handed in together, at most."""
_METRICS = ("ttft_ms", "itl_ms", "tpot_ms", "tok_s")


@dataclass(frozen=True)
class Workload:
    """`batch` requests of the same size."""

    batch: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}x{self.output_tokens}"


@dataclass(frozen=True)
class Requests:
    """Token ids of each prompt, and how many tokens to generate after each."""

    prompts: list[list[int]]
    outputs: list[int]
    once: bool = False
    """Measured at its first run, and only then."""

    @property
    def longest(self) -> int:
        pairs = zip(self.prompts, self.outputs, strict=True)
        return max(len(prompt) + output for prompt, output in pairs)


def parse_workloads(text: str) -> list[Workload]:
    """Reads "1x128x128,8x1024x1": batch, prompt tokens and output tokens of each.

    Raises:
        EvalError: it is something else.
    """
    parts = [part.split("x") for part in text.split(",")]
    if not all(len(part) == 3 and all(map(is_count, part)) for part in parts):
        raise EvalError(f"--workloads is {text}; accepted are BATCHxPROMPTxOUTPUT, such as {VLLM_WORKLOADS}")
    workloads = [Workload(*map(int, part)) for part in parts]
    for workload in workloads:
        check_tokens(workload.batch, workload.prompt_tokens + workload.output_tokens, f"--workloads has {workload}")
    return workloads


def check_tokens(batch: int, tokens: int, what: str) -> None:
    """Raises EvalError where a batch is of more than MOST_REQUESTS, or more than MOST_TOKENS with `tokens` for each."""
    if batch > MOST_REQUESTS:
        raise EvalError(f"{what}, which is {batch:,} requests; accepted are at most {MOST_REQUESTS:,} at once")
    if batch * tokens > MOST_TOKENS:
        raise EvalError(f"{what}, which is {batch * tokens:,} tokens; accepted are at most {MOST_TOKENS:,} at once")


def uniform_requests(workload: Workload, vocab_size: int) -> Requests:
    """Random prompts, the same for every setup."""
    prompts = random_prompts(workload.batch, workload.prompt_tokens, vocab_size)
    return Requests(prompts, [workload.output_tokens] * workload.batch)


def random_prompts(batch: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Token ids, the same at every call."""
    draw = random.Random(f"{batch} {tokens}")
    return [[draw.randrange(vocab_size) for _ in range(tokens)] for _ in range(batch)]


def throughput_requests(vocab_size: int, sequences: int = THROUGHPUT_SEQUENCES) -> Requests:
    """Requests of uniformly drawn lengths, the same at every call. They take long, so they run just once."""
    draw = random.Random(sequences)
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(*THROUGHPUT_TOKENS))] for _ in range(sequences)]
    return Requests(prompts, [draw.randint(*THROUGHPUT_TOKENS) for _ in range(sequences)], once=True)


def make_requests(workloads: Sequence[Workload], vocab_size: int, sequences: int = 0) -> list[Requests]:
    """The requests of each workload, and of the throughput workload where it has sequences."""
    throughput = [throughput_requests(vocab_size, sequences)] if sequences else []
    return [*(uniform_requests(workload, vocab_size) for workload in workloads), *throughput]


def run_setup(
    setup: Setup,
    arguments: Mapping[str, Any],
    workloads: Sequence[Requests],
    repeats: int,
    dummy: bool = True,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Measures one setup in a new process; what `speed_worker.bench` returns.

    Args:
        arguments: of the engine, besides the setup's own.
        dummy: the weights are random. vLLM then draws experts uniformly.
        timeout: seconds for the setup, its start included.

    Raises:
        EvalError: it failed or took too long; the message holds the first error and the end of its log.
    """
    request = {
        "engine": setup.engine,
        "arguments": {**arguments, **setup.arguments},
        "dummy": dummy,
        "workloads": [_runs(each, repeats) for each in workloads],
    }
    # On the CPU all cores, as nothing is served. vLLM's engine core has a process of its own, as everywhere in vLLM.
    ranks = arguments.get("tensor_parallel_size", 1)
    settings = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    if dummy:  # a router of random weights may send all tokens to few experts, of which fewer bytes are read
        settings["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = "uniform_random"
    environment = {**settings, **vllm_environment(ranks), **setup.env}
    return run_worker(speed_worker.bench, request, environment, timeout)


def _runs(requests: Requests, repeats: int) -> dict[str, Any]:
    runs = {"unmeasured": 0, "repeats": 1} if requests.once else {"unmeasured": 1, "repeats": repeats}
    return {"prompts": requests.prompts, "outputs": requests.outputs, **runs}


def measured_fields(requests: Requests, run: Mapping[str, Any], start_s: float) -> dict[str, Any]:
    """The fields of a row that both kinds share, but for engine and setup: medians, and how far repeats are apart.

    Args:
        run: one of `speed_worker.bench`'s.

    Raises:
        EvalError: a request has not as many tokens as asked for.
    """
    from rowint8.eval.results.schema import GIB

    weights, peak = (max(rank[key] for rank in run["ranks"]) for key in ("weights", "peak_mem"))
    runs = [_metrics(requests, repeat, weights, peak, start_s) for repeat in run["repeats"]]
    values = {key: [run[key] for run in runs] for key in _METRICS if runs[0][key] is not None}
    medians = {key: statistics.median(times) for key, times in values.items()}
    return dict(
        batch=len(requests.prompts),
        prompt_tokens=round(statistics.fmean(map(len, requests.prompts))),
        output_tokens=round(statistics.fmean(requests.outputs)),
        **{key: medians.get(key) for key in _METRICS},
        weights_gib=weights / GIB,
        peak_mem_gib=peak / GIB,
        repeats=len(runs),
        spread={key: (max(times) - min(times)) / medians[key] for key, times in values.items()},
        start_s=start_s,
    )


def _metrics(requests: Requests, repeat: Mapping[str, Any], weights: int, peak: int, start_s: float) -> dict[str, Any]:
    from rowint8.baseline_engine.metrics import RequestMetrics, RunMetrics

    start, times = repeat["start"], repeat["token_times"]
    for index, (tokens, count) in enumerate(zip(times, requests.outputs, strict=True), 1):
        if len(tokens) != count:
            raise EvalError(f"request {index}: the engine returned {len(tokens)} tokens, {count} were asked for")
    pairs = zip(requests.prompts, times, strict=True)
    answered = tuple(RequestMetrics(len(prompt), start, tuple(tokens)) for prompt, tokens in pairs)
    wall = max(tokens[-1] for tokens in times) - start
    return RunMetrics(answered, wall, peak, weights, load_seconds=start_s, compile_seconds=0.0).to_dict()
