"""Compiles and loads, before the first request, every kernel that a model can need.

Triton compiles a kernel when it is first launched, which takes seconds, and the number of tokens decides which kernel a
product takes. So each operator is launched once, on memory of any content, for every tile that it takes with 1 to
`max_tokens` tokens. What Triton has compiled before it reads from its cache on disk.

Not covered are tensors that no engine passes: activations at addresses off 16 bytes, a bias in another dtype.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from rowint8.kernels.add_rms_norm import add_rms_norm
from rowint8.kernels.gluon_products import gluon_tile
from rowint8.kernels.int8_linear import int8_linear
from rowint8.kernels.int8_swiglu import int8_swiglu
from rowint8.kernels.tiles.pick import pick_tile, shared_memory_limit
from rowint8.kernels.tiles.user import Tile, tuned_tokens

_THREADS = 8
_BLOCK_M = 16
"""Tokens of the smallest block on tensor cores: from here on, choices change only beyond its multiples."""


class WeightShape(NamedTuple):
    """An operator and the weight [n, k] that it is called with; for `add_rms_norm`, n = k is the hidden size."""

    op: Literal["linear", "swiglu", "add_rms_norm"]
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
    scratch = torch.empty(max((w.n * w.k for w in shapes), default=0), dtype=torch.int8, device=device)
    groups = defaultdict(list)
    for weight in shapes:
        for tile, m in _tokens_by_tile(weight, scratch, dtype, max_tokens).items():
            groups[_variant(weight, tile)].append((weight, m))
    driver.active.get_current_target()  # Triton makes its driver at first use, which is not safe in threads
    threads = min(_THREADS, os.cpu_count() or 1)
    # A new thread has no CUDA context, which tensor descriptors need, until it first calls the CUDA runtime.
    with ThreadPoolExecutor(threads, initializer=torch.cuda.synchronize, initargs=(device,)) as pool:
        list(pool.map(partial(_launch, scratch=scratch, dtype=dtype), groups.values()))
    torch.cuda.synchronize(device)
    return Ready(len(groups), perf_counter() - start)


def chosen_tile(op: str, tokens: Tensor, values: Tensor) -> Tile:
    """What `linear` or `swiglu` of [M, K] activations and an int8 [N, K] weight run with; neither is empty."""
    shape = tokens.shape[0], *values.shape
    return gluon_tile(op, tokens, values) or pick_tile(
        op, *shape, tokens.element_size(), shared_memory_limit(tokens.device)
    )


def _tokens_by_tile(
    weight: WeightShape, scratch: Tensor, dtype: torch.dtype, max_tokens: int
) -> dict[Tile | None, int]:
    """Each tile that the weight is multiplied with, and the smallest number of tokens that takes it."""
    if weight.op == "add_rms_norm":
        return {None: 1}
    values = _weight_in(scratch, weight)
    token = torch.empty(1, weight.k, dtype=dtype, device=scratch.device)
    tiles = {}
    for m in _choices(weight, max_tokens):
        tiles.setdefault(chosen_tile(weight.op, token.expand(m, -1), values), m)
    return tiles


def _choices(weight: WeightShape, max_tokens: int) -> list[int]:
    """Numbers of tokens, ascending, among which is one for every tile that any number up to `max_tokens` takes."""
    changes = {1, *range(_BLOCK_M, max_tokens, _BLOCK_M), *tuned_tokens(weight.op, weight.n, weight.k), max_tokens}
    few = range(1, _BLOCK_M)
    return sorted(m for m in {*few, *changes, *(m + 1 for m in changes)} if m <= max_tokens)


def _variant(weight: WeightShape, tile: Tile | None) -> tuple:
    """Launches with the same variant share a kernel, and are left to one thread, lest two compile it."""
    if tile is None:
        return weight.op, weight.n
    divisible = weight.n % 16 == 0, weight.k % 16 == 0, weight.k % tile.block_k == 0
    return weight.op, tile, weight.has_bias, *divisible


def _launch(launches: list[tuple[WeightShape, int]], scratch: Tensor, dtype: torch.dtype) -> None:
    device = scratch.device
    with torch.cuda.device(device):
        for weight, m in launches:
            op, n, k, has_bias = weight
            x = torch.empty(m, k, dtype=dtype, device=device)
            vector, scale = (torch.empty(n, dtype=each, device=device) for each in (dtype, torch.float16))
            values = _weight_in(scratch, weight)
            if op == "add_rms_norm":
                add_rms_norm(x, x, vector, 1e-5)
            elif op == "swiglu":
                int8_swiglu(x, values, scale)
            else:
                int8_linear(x, values, scale, vector if has_bias else None)


def _weight_in(scratch: Tensor, weight: WeightShape) -> Tensor:
    return scratch.narrow(0, 0, weight.n * weight.k).view(weight.n, weight.k)
