"""Latency of `vllm serve` under load, one server a setup, measured by vLLM's own client `vllm bench serve`.

Requests arrive at random (Poisson) at a given mean rate; each has the same number of random prompt tokens and as many
output tokens as asked for. A model of dummy weights needs a tokenizer whose words are its token ids, so that the text
which the client sends has exactly as many tokens as it should (`setups.write_tokenizer`).
"""

import json
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rowint8.eval.engines.server import vllm_server
from rowint8.eval.engines.setups import SERVED
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import is_count
from rowint8.eval.processes import console_script, run_quietly, vllm_environment
from rowint8.eval.results.schema import ServeRow

NUM_WARMUPS = 8
"""Requests before each run that do not count."""
LIMITS = ("ttft", "tpot", "e2el")
MOST_SECONDS = 86_400
MOST_REQUESTS = 1_000_000
"""The largest number of requests of one rate, as MOST_SECONDS is the longest time."""


@dataclass(frozen=True)
class Load:
    """What the client sends."""

    prompt_tokens: int
    output_tokens: int
    seconds: float
    """How long to send at each rate."""
    goodput: Mapping[str, float]
    """Limits in ms that a request must meet to count, by the names in LIMITS."""


def parse_rates(text: str, seconds: float) -> list[float]:
    """Reads "4,8,16": requests per second, sent for so many seconds.

    Raises:
        EvalError: it is something else, or the requests of a rate take more than a day or are too many.
    """
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise EvalError(f"--rates is {text}; accepted are positive numbers of requests per second, such as 4,8,16")
    if not all(2 / rate <= MOST_SECONDS and rate * seconds <= MOST_REQUESTS for rate in rates):
        raise EvalError(
            f"--rates is {text}; accepted are rates at which 2 requests or more come in a day and {MOST_REQUESTS:,} or "
            f"fewer in --seconds {seconds:g}"
        )
    return rates


def parse_goodput(text: str) -> dict[str, float]:
    """Reads "ttft:200,tpot:50": limits in ms.

    Raises:
        EvalError: it is something else, or names a limit twice.
    """
    pairs = [part.split(":") for part in text.split(",")]
    known = all(len(pair) == 2 and pair[0] in LIMITS and is_count(pair[1]) for pair in pairs)
    if not known or len(dict(pairs)) < len(pairs):
        raise EvalError(
            f"--goodput is {text}; accepted are NAME:MS of {', '.join(LIMITS)}, each once, such as ttft:200,tpot:50"
        )
    return {name: float(limit) for name, limit in pairs}


def server_arguments(load: Load, tensor_parallel_size: int, eager: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that all setups share; CUDA graphs and batch limits are vLLM's own."""
    return {
        "dtype": "bfloat16",
        "max_model_len": load.prompt_tokens + load.output_tokens,
        "tensor_parallel_size": tensor_parallel_size,
        "enforce_eager": eager,
    }


def server_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Flags of `vllm serve` that mean what arguments of `vllm.LLM` do."""
    flags = ["--no-enable-prefix-caching"]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
    return flags


def run_setup(
    name: str, model: Path, arguments: Mapping[str, Any], rates: Sequence[float], load: Load, repeats: int = 1
) -> Iterator[ServeRow]:
    """Starts a server, sends the load so many times at each rate, stops the server; a row a time.

    Args:
        name: one of SERVED.
        arguments: of `vllm.LLM`, shared by all setups.

    Raises:
        EvalError: the server or a request failed.
    """
    flags = server_flags({**arguments, **SERVED[name].arguments})
    with vllm_server(model, flags, arguments["tensor_parallel_size"]) as base_url:
        for rate, seed in product(rates, range(repeats)):
            yield send(name, model, base_url, rate, load, seed)


def send(name: str, model: Path, base_url: str, rate: float, load: Load, seed: int = 0) -> ServeRow:
    """One run of the client against a running server; `seed` draws the prompts and when they come.

    Raises:
        EvalError: it failed, or a request did.
    """
    with tempfile.TemporaryDirectory() as scratch:
        flags = _client_flags(rate, load, seed)
        place = ["--model", str(model), "--base-url", base_url.removesuffix("/v1")]
        save = ["--save-result", "--save-detailed", "--result-dir", scratch, "--result-filename", "result.json"]
        run_quietly([console_script("vllm"), "bench", "serve", *place, *flags, *save], vllm_environment())
        result = json.loads((Path(scratch) / "result.json").read_text())
    return row_of(name, rate, load, result, shlex.join(["vllm", "bench", "serve", *flags]))


def _client_flags(rate: float, load: Load, seed: int = 0) -> list[str]:
    num_prompts = max(2, round(rate * load.seconds))
    flags = ["--backend", "openai", "--dataset-name", "random", "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    flags += ["--random-input-len", str(load.prompt_tokens), "--random-output-len", str(load.output_tokens)]
    flags += ["--request-rate", f"{rate:g}", "--num-prompts", str(num_prompts), "--seed", str(seed)]
    flags += ["--num-warmups", str(NUM_WARMUPS)]
    flags += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,95,99"]
    return [*flags, "--goodput", *(f"{name}:{limit:g}" for name, limit in load.goodput.items())]


def row_of(name: str, rate: float, load: Load, result: Mapping[str, Any], command: str) -> ServeRow:
    """The row of one result file of `vllm bench serve`.

    Raises:
        EvalError: requests failed or stopped early.
    """
    failed = result["num_prompts"] - result["completed"]
    if failed or result["total_output_tokens"] != result["completed"] * load.output_tokens:
        raise EvalError(
            f"{name} at {rate:g} requests/s: {failed} of {result['num_prompts']} requests failed, "
            f"{result['total_output_tokens']} output tokens came{_first_error(result)}"
        )
    percentiles: dict[str, Any] = {
        f"{metric}_ms": {p: result[f"{p}_{metric}_ms"] for p in ("p50", "p95", "p99")}
        for metric in ("ttft", "tpot", "itl")
    }
    return ServeRow(
        engine="vllm",
        setup=name,
        request_rate=rate,
        requests=result["completed"],
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        tok_s=result["output_throughput"],
        goodput=result["request_goodput"],
        goodput_limits_ms=dict(load.goodput),
        command=command,
        **percentiles,
    )


def _first_error(result: Mapping[str, Any]) -> str:
    errors = (error.strip() for error in result.get("errors", ()))
    return next((f"; the first said: {error.splitlines()[-1]}" for error in errors if error), "")
