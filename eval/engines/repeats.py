"""Repeated runs of one workload as the common part of a row: medians, and how far the repeats are apart."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rowint8.baseline_engine.metrics import RequestMetrics, RunMetrics
from rowint8.eval.errors import EvalError
from rowint8.eval.results.schema import GIB

_METRICS = ("ttft_ms", "itl_ms", "tpot_ms", "tok_s")


def measured_fields(
    repeats: Sequence[Mapping[str, Any]],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    weights: int,
    peak_mem: int,
    start_s: float,
) -> dict[str, Any]:
    """The fields that `VllmRow` and `EngineRow` share, but for engine and setup.

    Args:
        repeats: of each {"start": when the requests were handed in, "token_times": for each request when its tokens
            came}, in seconds on one clock.
        prompt_tokens: of each request, as is output_tokens.
        weights: bytes, as is peak_mem.

    Raises:
        EvalError: a request has not as many tokens as asked for.
    """
    runs = [_run(repeat, prompt_tokens, output_tokens, weights, peak_mem, start_s).to_dict() for repeat in repeats]
    values = {key: [run[key] for run in runs] for key in _METRICS if runs[0][key] is not None}
    medians = {key: statistics.median(times) for key, times in values.items()}
    return dict(
        batch=len(prompt_tokens),
        prompt_tokens=round(statistics.fmean(prompt_tokens)),
        output_tokens=round(statistics.fmean(output_tokens)),
        **{key: medians.get(key) for key in _METRICS},
        weights_gib=weights / GIB,
        peak_mem_gib=peak_mem / GIB,
        repeats=len(runs),
        spread={key: (max(times) - min(times)) / medians[key] for key, times in values.items()},
        start_s=start_s,
    )


def _run(
    repeat: Mapping[str, Any],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    weights: int,
    peak_mem: int,
    start_s: float,
) -> RunMetrics:
    start, times = repeat["start"], repeat["token_times"]
    for index, (tokens, count) in enumerate(zip(times, output_tokens, strict=True), 1):
        if len(tokens) != count:
            raise EvalError(f"request {index}: the engine returned {len(tokens)} tokens, {count} were asked for")
    requests = tuple(
        RequestMetrics(count, start, tuple(tokens)) for count, tokens in zip(prompt_tokens, times, strict=True)
    )
    wall = max(tokens[-1] for tokens in times) - start
    return RunMetrics(requests, wall, peak_mem, weights, load_seconds=start_s, compile_seconds=0.0)
