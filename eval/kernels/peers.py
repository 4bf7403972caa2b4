"""Other 8-bit products on the same weights, and vLLM's small kernels, where they are installed.

They are called as vLLM 0.26 to 0.33 call them.
"""

import inspect
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.eval.errors import EvalError
from rowint8.eval.processes import run_worker
from rowint8.kernels.quantize import Int8Weight, dequantize

BUCKETS = (1, 2, 16, 32)
"""Up to each of these numbers of tokens, and beyond the last, one tuning serves all: that of the first met."""
_BEYOND_BUCKETS = 8192

Product = Callable[[Tensor], Tensor]
"""[M, K] -> [M, N] in the dtype that it was made for."""


class RoundedProduct(NamedTuple):
    """A product of 8-bit tokens, in its two steps; called, it takes both: a `Product`."""

    round: Callable[[Tensor], tuple[Tensor, Tensor]]
    """[M, K] -> 8-bit [M, K] and a scale a token."""
    multiply: Callable[[Tensor, Tensor], Tensor]
    """What `round` returns -> [M, N]."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(*self.round(x))


def marlin(weight: Int8Weight, dtype: torch.dtype) -> Product:
    """vLLM's Marlin W8A16, one scale a row."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    ops: Any = _custom_ops
    n, k = weight.values.shape
    empty = torch.empty(0, dtype=torch.int32, device="cuda")
    sizes = dict(perm=empty, size_k=k, size_n=n, num_bits=8)
    packed = ops.gptq_marlin_repack(_packed(weight.values), **_accepted(ops.gptq_marlin_repack, sizes))
    scale = marlin_utils.marlin_permute_scales(_scale_row(weight, dtype), size_k=k, size_n=n, group_size=-1)
    workspace = marlin_utils.marlin_make_workspace_new(torch.device("cuda"))
    apply: Any = marlin_utils.apply_gptq_marlin_linear
    fixed: dict[str, Any] = dict(
        weight=packed,
        weight_scale=scale,
        weight_zp=empty,
        g_idx=empty,
        g_idx_sort_indices=empty,
        workspace=workspace,
        wtype=scalar_types.uint8b128,
        output_size_per_partition=n,
        input_size_per_partition=k,
        is_k_full=True,
    )
    given = _accepted(apply, fixed)
    return lambda x: apply(x, **given)


def _accepted(function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function has: vLLM 0.32 and newer ask for no permutation."""
    return {name: value for name, value in given.items() if name in inspect.signature(function).parameters}


def machete(weight: Int8Weight, dtype: torch.dtype) -> Product:
    """vLLM's Machete W8A16, one scale a row; Hopper only."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint8b128
    columns = _packed(weight.values).t().contiguous().t()
    packed = ops.machete_prepack_B(columns, a_type=dtype, b_type=kind, group_scales_type=dtype)
    scale = _scale_row(weight, dtype)
    return lambda x: ops.machete_mm(a=x, b_q=packed, b_type=kind, b_group_scales=scale, b_group_size=-1)


def humming(weight: Int8Weight, dtype: torch.dtype) -> Product:
    """Humming's W8A16, one scale a row, with the tile of its own heuristic, compiled when it first meets an M."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]
    from humming.tune import get_heuristics_config  # type: ignore[import-not-found]

    n, k = weight.values.shape
    padding = dict(pad_n_to_multiple=256, pad_k_to_multiple=128)  # as in vLLM
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config={"dtype": "int8"}, torch_dtype=dtype, **padding).cuda()
    layer.load_from_unquantized(dequantize(weight, dtype))
    layer.transform()
    return lambda x: layer(x, tuning_config=get_heuristics_config(layer.humming_metas[""], shape_m=x.shape[0]))


def cutlass_fp8(weight: Int8Weight, dtype: torch.dtype) -> RoundedProduct:
    """vLLM's CUTLASS FP8, a scale a row and one a token."""
    from vllm import _custom_ops as ops

    dense = dequantize(weight)
    scale = dense.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    columns = (dense / scale).to(torch.float8_e4m3fn).t()

    def multiply(tokens: Tensor, of_tokens: Tensor) -> Tensor:
        return ops.cutlass_scaled_mm(tokens, columns, of_tokens, scale, dtype)

    return RoundedProduct(lambda x: ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True), multiply)


def cutlass_int8(weight: Int8Weight, dtype: torch.dtype) -> RoundedProduct:
    """As `cutlass_fp8`, of the same INT8 values as ours, without other memory."""
    from vllm import _custom_ops as ops

    columns, scale = weight.values.t(), weight.scale.float()[:, None]

    def multiply(tokens: Tensor, of_tokens: Tensor) -> Tensor:
        return ops.cutlass_scaled_mm(tokens, columns, of_tokens, scale, dtype)

    return RoundedProduct(lambda x: ops.scaled_int8_quant(x)[:2], multiply)


def gemlite(weight: Int8Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """gemlite's A16W8, one scale a row, with as much of its own tuning as a benchmark has time for.

    When it first meets a weight shape with a number of tokens, it times about twenty variants, each of which takes a
    second or two to compile. So one tuning serves several numbers of tokens (`BUCKETS`); beyond them, where others are
    far ahead, it chooses between its two default tiles; and `gemlite_ahead` fills Triton's cache on disk.
    """
    make = _gemlite_helper().A16W8_INT8(device="cuda:0", dtype=dtype)
    return make.from_weights(weight.values, scales=weight.scale.to(dtype)[:, None])


def gemlite_bucket(tokens: int) -> int:
    """The number that stands for `tokens` in gemlite's tuning."""
    return next((limit for limit in BUCKETS if tokens <= limit), _BEYOND_BUCKETS)


@cache
def _gemlite_helper() -> Any:
    import gemlite  # type: ignore[import-not-found]
    from gemlite import helper  # type: ignore[import-not-found]

    gemlite.set_autotune_setting(gemlite_bucket)
    gemlite.set_autotune({"GEMM": "default"})  # more than 32 tokens; reloads the kernels, which then see the buckets
    return helper


def gemlite_ahead(sizes: Iterable[tuple[int, int]], tokens: Iterable[int], dtype: torch.dtype, seconds: float) -> bool:
    """Compiles in parallel what tuning for [N, K] weights and numbers of tokens will ask for; True.

    What is not done after `seconds` is stopped; tuning compiles it then.

    Raises:
        ImportError: gemlite is not installed.
    """
    _gemlite_helper()
    first_met = {gemlite_bucket(m): m for m in reversed(tuple(tokens))}
    jobs = [dict(n=n, k=k, m=m, dtype=str(dtype).removeprefix("torch.")) for n, k in sizes for m in first_met.values()]
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _run_apart(job, deadline), jobs))
    return True


def _run_apart(job: dict[str, Any], deadline: float) -> None:
    left = deadline - time.monotonic()
    if left > 0:
        with suppress(EvalError):
            run_worker(tune_gemlite, job, os.environ, left)


def tune_gemlite(n: int, k: int, m: int, dtype: str) -> None:
    """Lets gemlite tune, and so compile, the product of [m, k] with [n, k]."""
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    weight = Int8Weight(values, torch.ones(n, dtype=torch.float16, device="cuda"))
    x = torch.randn(m, k, dtype=getattr(torch, dtype), device="cuda")
    gemlite(weight, x.dtype)(x)


PEERS: dict[str, Callable[[Int8Weight, torch.dtype], Product]] = {
    "marlin": marlin,
    "machete": machete,
    "gemlite": gemlite,
    "humming": humming,
}
"""Those with weights alone in 8 bits."""


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """vLLM's activation kernel: [M, 2I] -> [M, I]. `load_vllm` first."""
    out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    torch.ops._C.silu_and_mul(out, gate_up)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """vLLM's `fused_add_rms_norm`: (normed, total), both [M, H], written over x and residual. `load_vllm` first."""
    torch.ops._C.fused_add_rms_norm(x, residual, weight, eps)
    return x, residual


def load_vllm() -> bool:
    """Registers vLLM's kernels; True.

    Raises:
        ImportError, AttributeError: they are not installed.
    """
    import vllm._custom_ops  # noqa: F401

    return bool(torch.ops._C.silu_and_mul and torch.ops._C.fused_add_rms_norm)


def _packed(values: Tensor) -> Tensor:
    """int8 [N, K] -> int32 [K / 4, N], four values of a column in each, offset by 128."""
    n, k = values.shape
    bytes_ = (values.t().contiguous().view(torch.uint8) ^ 0x80).view(k // 4, 4, n)
    return bytes_.permute(0, 2, 1).contiguous().view(torch.int32).view(k // 4, n)


def _scale_row(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    return weight.scale.to(dtype)[None, :].contiguous()
