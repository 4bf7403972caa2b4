"""Other 8-bit products on the same weights, and vLLM's small kernels, where they are installed.

They are called as vLLM 0.26 to 0.33 call them.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.eval.kernels.gemlite_peer import gemlite
from rowint8.kernels.quantize import Int8Weight, dequantize

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
