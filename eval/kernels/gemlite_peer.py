"""gemlite's A16W8 as a peer, with as much of its own tuning as a benchmark has time for.

When gemlite first meets a weight shape with a number of tokens, it times about twenty variants of its kernel, and each
takes a second or two to compile: ten minutes for the shapes and tokens of one benchmark. So here one tuning serves
several numbers of tokens (`BUCKETS`); beyond them, where other kernels are far ahead of it, gemlite chooses between its
two default tiles only; and parallel processes compile the variants into Triton's cache on disk before the benchmark's
own process tunes, alone on the GPU.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rowint8.eval.errors import EvalError
from rowint8.eval.processes import run_worker
from rowint8.kernels.quantize import Int8Weight

BUCKETS = (1, 2, 16, 32)
"""Up to each of these numbers of tokens, and beyond the last, one tuning serves all: that of the first met."""
_BEYOND = 8192


def gemlite(weight: Int8Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """gemlite's A16W8, one scale a row: [M, K] -> [M, N] in `dtype`."""
    make = _helper().A16W8_INT8(device="cuda:0", dtype=dtype)
    return make.from_weights(weight.values, scales=weight.scale.to(dtype)[:, None])


def bucket(tokens: int) -> int:
    """The number that stands for `tokens` in gemlite's tuning."""
    return next((limit for limit in BUCKETS if tokens <= limit), _BEYOND)


@cache
def _helper() -> Any:
    import gemlite  # type: ignore[import-not-found]
    from gemlite import helper  # type: ignore[import-not-found]

    gemlite.set_autotune_setting(bucket)
    gemlite.set_autotune({"GEMM": "default"})  # more than 32 tokens; reloads the kernels, which then see the buckets
    return helper


def compile_ahead(sizes: Iterable[tuple[int, int]], tokens: Iterable[int], dtype: torch.dtype, seconds: float) -> bool:
    """Compiles in parallel what tuning for [N, K] weights and numbers of tokens will ask for; True.

    What is not done after `seconds` is stopped; tuning compiles it then.

    Raises:
        ImportError: gemlite is not installed.
    """
    _helper()
    first_met = {bucket(m): m for m in reversed(tuple(tokens))}
    jobs = [dict(n=n, k=k, m=m, dtype=str(dtype).removeprefix("torch.")) for n, k in sizes for m in first_met.values()]
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _run_apart(job, deadline), jobs))
    return True


def _run_apart(job: dict[str, Any], deadline: float) -> None:
    left = deadline - time.monotonic()
    if left > 0:
        with suppress(EvalError):
            run_worker(tune, job, os.environ, left)


def tune(n: int, k: int, m: int, dtype: str) -> None:
    """Lets gemlite tune, and so compile, the product of [m, k] with [n, k]."""
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    weight = Int8Weight(values, torch.ones(n, dtype=torch.float16, device="cuda"))
    x = torch.randn(m, k, dtype=getattr(torch, dtype), device="cuda")
    gemlite(weight, x.dtype)(x)
