"""Compiles and loads, before the first request, every kernel that a model can need.

Triton compiles a kernel when it is first launched, which takes seconds, and the number of tokens decides which kernel a
product takes. So each operator is launched once, on memory of any content, for every tile that it takes with 1 to
`max_tokens` tokens. What Triton has compiled before it reads from its cache on disk.

Not covered are tensors that no engine passes: activations at addresses off 16 bytes, a bias in another dtype.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from rowint8.kernels import dispatch
from rowint8.kernels.add_rms_norm import add_rms_norm
from rowint8.kernels.int8_tokens import add_rms_norm_int8, quantize_tokens

_THREADS = 8


class WeightShape(NamedTuple):
    """An operator and the weight [n, k] that it is called with; for `add_rms_norm`, n = k is the hidden size. For the
    operators that round tokens to INT8, n is the block of the rotation."""

    op: Literal[
        "linear", "swiglu", "add_rms_norm", "linear_int8", "swiglu_int8", "quantize_tokens", "add_rms_norm_int8"
    ]
    n: int
    k: int
    has_bias: bool = False


class Ready(NamedTuple):
    kernels: int
    """Variants that were launched."""
    seconds: float


def warmup(weights: Iterable[WeightShape], dtype: torch.dtype, device: torch.device, max_tokens: int) -> Ready:
    """Makes the kernels ready for these weights, activations of `dtype` and any number of tokens up to `max_tokens`.

    Needs memory for the largest of the weights and, in each of 8 threads, for activations. Nothing to do on a CPU.
    """
    if device.type != "cuda":
        return Ready(0, 0.0)
    start = perf_counter()
    shapes = [weight for weight in dict.fromkeys(weights) if weight.n and weight.k]
    products = [w.n * w.k for w in shapes if w.op in dispatch.OPERATORS]
    scratch = torch.empty(max(products, default=0), dtype=torch.int8, device=device)
    groups = defaultdict(list)
    for weight in shapes:
        for variant, launch in _launches(weight, scratch, dtype, max_tokens):
            groups[variant].append(launch)
    in_threads(partial(_launch, scratch=scratch, dtype=dtype), groups.values(), device)
    return Ready(len(groups), perf_counter() - start)


def in_threads(launch: Callable[[Any], None], items: Iterable[Any], device: torch.device) -> None:
    """Launches something for each item, in threads: kernels are compiled side by side. Returns when all have run."""
    driver.active.get_current_target()  # Triton makes its driver at first use, which is not safe in threads
    threads = min(_THREADS, os.cpu_count() or 1)
    # A new thread has no CUDA context, which tensor descriptors need, until it first calls the CUDA runtime.
    with ThreadPoolExecutor(threads, initializer=torch.cuda.synchronize, initargs=(device,)) as pool:
        list(pool.map(launch, items))
    torch.cuda.synchronize(device)


def _launches(
    weight: WeightShape, scratch: Tensor, dtype: torch.dtype, max_tokens: int
) -> Iterator[tuple[tuple, tuple[WeightShape, int]]]:
    """(variant, (weight, tokens)) of each kernel that the weight needs.

    Launches with the same variant share a kernel, and are left to one thread, lest two compile it.
    """
    op, n, k, has_bias = weight
    if op not in dispatch.OPERATORS:
        yield (op, n, k), (weight, 1)
        return
    token = torch.empty(1, k, dtype=_token_dtype(op, dtype), device=scratch.device)
    for tile, m in dispatch.tokens_by_tile(op, token, _weight_in(scratch, weight), max_tokens, dtype).items():
        yield (has_bias, *dispatch.compilation(op, tile, n, k)), (weight, m)


def _launch(launches: list[tuple[WeightShape, int]], scratch: Tensor, dtype: torch.dtype) -> None:
    device = scratch.device
    with torch.cuda.device(device):
        for weight, m in launches:
            op, n, k, has_bias = weight
            x = torch.empty(m, k, dtype=_token_dtype(op, dtype), device=device)
            if op not in dispatch.OPERATORS:
                _launch_norm(op, x, n)
                continue
            vector, scale = (torch.empty(n, dtype=each, device=device) for each in (dtype, torch.float16))
            bias = vector if has_bias else None
            values = _weight_in(scratch, weight)
            if x.dtype == torch.int8:
                token_scale = torch.empty(m, dtype=torch.float32, device=device)
                dispatch.run_int8(op, x, token_scale, values, scale, bias, dtype)
            else:
                dispatch.run(op, x, values, scale, bias)


def _launch_norm(op: str, x: Tensor, block: int) -> None:
    """Launches what makes tokens for products."""
    weight = torch.empty(x.shape[1], dtype=x.dtype, device=x.device)
    if op == "add_rms_norm":
        add_rms_norm(x, x, weight, 1e-5)
    elif op == "add_rms_norm_int8":
        add_rms_norm_int8(x, x, weight, 1e-5, block)
    else:
        quantize_tokens(x, block)


def _token_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    return torch.int8 if op in ("linear_int8", "swiglu_int8") else dtype


def _weight_in(scratch: Tensor, weight: WeightShape) -> Tensor:
    return scratch.narrow(0, 0, weight.n * weight.k).view(weight.n, weight.k)
