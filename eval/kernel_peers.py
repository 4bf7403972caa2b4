"""Other 8-bit weight-only products on the same weights, where they are installed: Marlin, Machete, gemlite.

Marlin and Machete are called as vLLM 0.26 does it; elsewhere their signatures may differ, and they count as absent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rowint8.eval.errors import EvalError
from rowint8.kernels.quantize import Int8Weight

Product = Callable[[Tensor], Tensor]
"""bf16 [M, K] -> [M, N]."""


def marlin(weight: Int8Weight) -> Product:
    """vLLM's Marlin W8A16, one scale a row."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    ops: Any = _custom_ops
    n, k = weight.values.shape
    empty = torch.empty(0, dtype=torch.int32, device="cuda")
    packed = ops.gptq_marlin_repack(_packed(weight.values), empty, k, n, 8)
    scale = marlin_utils.marlin_permute_scales(_scale_row(weight), k, n, -1)
    workspace = marlin_utils.marlin_make_workspace_new(torch.device("cuda"))
    apply: Any = marlin_utils.apply_gptq_marlin_linear
    kind = scalar_types.uint8b128
    return lambda x: apply(x, packed, scale, empty, empty, empty, workspace, kind, n, k, True)


def machete(weight: Int8Weight) -> Product:
    """vLLM's Machete W8A16, one scale a row; Hopper only."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind, bf16 = scalar_types.uint8b128, torch.bfloat16
    packed = ops.machete_prepack_B(_packed(weight.values).t().contiguous().t(), bf16, kind, bf16)
    scale = _scale_row(weight)
    return lambda x: ops.machete_mm(x, packed, kind, b_group_scales=scale, b_group_size=-1)


def gemlite(weight: Int8Weight) -> Product:
    """gemlite's A16W8, one scale a row."""
    from gemlite.helper import A16W8_INT8  # type: ignore[import-not-found]

    return A16W8_INT8(device="cuda:0").from_weights(weight.values, scales=weight.scale.bfloat16()[:, None])


PEERS: dict[str, Callable[[Int8Weight], Product]] = {"marlin": marlin, "machete": machete, "gemlite": gemlite}


def prepare(x: Tensor, weights: list[Int8Weight], reference: Tensor) -> tuple[dict[str, list[Product]], dict[str, str]]:
    """Each peer's product for each copy of the weight, and why the others are absent.

    Args:
        reference: [M, N] of the first weight with x [M, K]; every peer must agree with it.

    Raises:
        EvalError: a peer computes something else.
    """
    products: dict[str, list[Product]] = {}
    absent: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            products[name] = [make(weight) for weight in weights]
            out = products[name][0](x)
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            products.pop(name, None)
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        error = float((out.float() - reference.float()).norm() / reference.float().norm())
        if not error < 0.02:
            raise EvalError(f"{name} does not compute the same product: relative difference {error:.3f}")
    return products, absent


def vllm_silu_and_mul(gate_up: Tensor) -> Tensor:
    """vLLM's activation kernel: [M, 2I] -> [M, I].

    Raises:
        ImportError, AttributeError: vLLM's CUDA kernels are not installed.
    """
    import vllm._custom_ops  # noqa: F401  # registers the kernels

    out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    torch.ops._C.silu_and_mul(out, gate_up)
    return out


def _packed(values: Tensor) -> Tensor:
    """int8 [N, K] -> int32 [K / 4, N], four values of a column in each, offset by 128."""
    n, k = values.shape
    bytes_ = (values.t().contiguous().view(torch.uint8) ^ 0x80).view(k // 4, 4, n)
    return bytes_.permute(0, 2, 1).contiguous().view(torch.int32).view(k // 4, n)


def _scale_row(weight: Int8Weight) -> Tensor:
    return weight.scale.bfloat16()[None, :].contiguous()
