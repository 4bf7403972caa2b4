"""Defines the operators `rowint8::...` of `ops` for torch.

All are `torch.library` operators, so `torch.compile` puts them into a graph as they are. CUDA tensors run the kernel
that `dispatch` chooses, CPU tensors ATen (`cpu`). A new operator is an entry of `OPERATORS`; a product is also one of
`dispatch.OPERATORS`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.kernels import checks, cpu, cpu_int8
from rowint8.kernels.experts.checks import check_experts, check_experts_int8
from rowint8.kernels.experts.cpu import experts as experts_cpu
from rowint8.kernels.experts.cpu import experts_int8 as experts_int8_cpu


def _product(kernel: Callable[..., Tensor], x: Tensor, *weight: Tensor | None) -> Tensor:
    """Runs a kernel of [M, K] activations for any leading dimensions."""
    return _unflatten(kernel(_flatten(x), *weight), x)


def _norm(
    kernel: Callable[..., tuple[Tensor, Tensor]], x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Runs a kernel of contiguous [M, H] activations for any leading dimensions and strides."""
    normed, total = kernel(_flatten(x), _flatten(residual), weight.contiguous(), eps)
    return _unflatten(normed, x), _unflatten(total, x)


def _quantize(kernel: Callable[..., tuple[Tensor, Tensor]], x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    q, scale = kernel(_flatten(x), block)
    return _unflatten(q, x), scale.view(x.shape[:-1])


def _norm_int8(
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]], x: Tensor, residual: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weight, eps, block = given
    q, scale, total = kernel(_flatten(x), _flatten(residual), weight.contiguous(), eps, block)
    return _unflatten(q, x), scale.view(x.shape[:-1]), _unflatten(total, x)


def _product_int8(kernel: Callable[..., Tensor], tokens: Tensor, token_scale: Tensor, *given: Any) -> Tensor:
    return _unflatten(kernel(_flatten(tokens), token_scale.reshape(-1).contiguous(), *given), tokens)


def _experts(kernel: Callable[..., Tensor], x: Tensor, *given: Any) -> Tensor:
    *layer, weights, ids = given[:6]
    return _unflatten(kernel(_flatten(x), *layer, _flatten(weights), _flatten(ids), *given[6:]), x)


def _flatten(x: Tensor) -> Tensor:
    """[..., K] to contiguous [M, K]."""
    return (x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])).contiguous()


def _unflatten(out: Tensor, x: Tensor) -> Tensor:
    """[M, N] to [..., N] with the leading dimensions of x."""
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def _product_cuda(op: str, *given: Any) -> Tensor:
    from rowint8.kernels.dispatch import run

    return run(op, *given)


def _add_rms_norm_cuda(*given: Any) -> tuple[Tensor, Tensor]:
    from rowint8.kernels.add_rms_norm import add_rms_norm as kernel

    return kernel(*given)


def _quantize_tokens_cuda(*given: Any) -> tuple[Tensor, Tensor]:
    from rowint8.kernels.int8_tokens import quantize_tokens as kernel

    return kernel(*given)


def _add_rms_norm_int8_cuda(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    from rowint8.kernels.int8_tokens import add_rms_norm_int8 as kernel

    return kernel(*given)


def _linear_int8_cuda(*given: Any) -> Tensor:
    from rowint8.kernels.dispatch import run_int8

    return run_int8("linear_int8", *given)


def _swiglu_int8_cuda(tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    from rowint8.kernels.dispatch import run_int8

    return run_int8("swiglu_int8", tokens, token_scale, values, scale, None, dtype)


def _experts_cuda(*given: Any) -> Tensor:
    from rowint8.kernels.experts.launch import experts as kernels

    return kernels(*given)


def _experts_int8_cuda(*given: Any) -> Tensor:
    from rowint8.kernels.experts.hopper import Rotation
    from rowint8.kernels.experts.launch import experts as kernels

    *layer, expert_map, block, hidden_block = given
    return kernels(*layer, None, None, expert_map, rotation=Rotation(block, hidden_block))


class Operator(NamedTuple):
    schema: str
    check: Callable[..., None]
    """Raises ValueError unless the arguments fit together."""
    outputs: Callable[..., Any]
    """Outputs for arguments that have no memory."""
    run: Callable[..., Any]
    """Brings the arguments into the shape that the kernels take, and their outputs into that of the caller."""
    cpu: Callable[..., Any]
    cuda: Callable[..., Any]


OPERATORS = {
    "linear": Operator(
        "(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor",
        check=checks.check_linear,
        outputs=lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0]),
        run=_product,
        cpu=cpu.linear,
        cuda=partial(_product_cuda, "linear"),
    ),
    "swiglu": Operator(
        "(Tensor x, Tensor values, Tensor scale) -> Tensor",
        check=checks.check_swiglu,
        outputs=lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0] // 2),
        run=_product,
        cpu=cpu.swiglu,
        cuda=partial(_product_cuda, "swiglu"),
    ),
    "add_rms_norm": Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        check=checks.check_norm,
        outputs=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
        run=_norm,
        cpu=cpu.add_rms_norm,
        cuda=_add_rms_norm_cuda,
    ),
    "quantize_tokens": Operator(
        "(Tensor x, int block) -> (Tensor, Tensor)",
        check=checks.check_tokens,
        outputs=lambda x, _: (x.new_empty(x.shape, dtype=torch.int8), _scales(x)),
        run=_quantize,
        cpu=cpu_int8.quantize_tokens,
        cuda=_quantize_tokens_cuda,
    ),
    "linear_int8": Operator(
        "(Tensor tokens, Tensor token_scale, Tensor values, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
        check=checks.check_linear_int8,
        outputs=lambda x, _, values, *given: x.new_empty(*x.shape[:-1], values.shape[0], dtype=given[-1]),
        run=_product_int8,
        cpu=cpu_int8.linear,
        cuda=_linear_int8_cuda,
    ),
    "swiglu_int8": Operator(
        "(Tensor tokens, Tensor token_scale, Tensor values, Tensor scale, ScalarType dtype) -> Tensor",
        check=checks.check_swiglu_int8,
        outputs=lambda x, _, values, *given: x.new_empty(*x.shape[:-1], values.shape[0] // 2, dtype=given[-1]),
        run=_product_int8,
        cpu=cpu_int8.swiglu,
        cuda=_swiglu_int8_cuda,
    ),
    "add_rms_norm_int8": Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps, int block) -> (Tensor, Tensor, Tensor)",
        check=checks.check_norm_int8,
        outputs=lambda x, *_: (x.new_empty(x.shape, dtype=torch.int8), _scales(x), x.new_empty(x.shape)),
        run=_norm_int8,
        cpu=cpu_int8.add_rms_norm,
        cuda=_add_rms_norm_int8_cuda,
    ),
    "experts": Operator(
        "(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor weights, Tensor ids, "
        "Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? expert_map=None, str activation='silu', "
        "float alpha=1.702, float? limit=None) -> Tensor",
        check=check_experts,
        outputs=lambda x, *_: x.new_empty(x.shape),
        run=_experts,
        cpu=experts_cpu,
        cuda=_experts_cuda,
    ),
    "experts_int8": Operator(
        "(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor weights, Tensor ids, "
        "Tensor? expert_map, int block, int hidden_block) -> Tensor",
        check=check_experts_int8,
        outputs=lambda x, *_: x.new_empty(x.shape),
        run=_experts,
        cpu=experts_int8_cpu,
        cuda=_experts_int8_cuda,
    ),
}


def _scales(x: Tensor) -> Tensor:
    """Outputs of [..., K] tokens for their scales."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _checked(check: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    """`then`, for arguments that fit together."""

    def operator(*given: Any) -> Any:
        check(*given)
        return then(*given)

    return operator


_library = torch.library.Library("rowint8", "DEF")
for _name, _operator in OPERATORS.items():
    _library.define(_name + _operator.schema)
    torch.library.register_fake(f"rowint8::{_name}", _checked(_operator.check, _operator.outputs), lib=_library)
    for _device, _kernel in (("CPU", _operator.cpu), ("CUDA", _operator.cuda)):
        _library.impl(_name, _checked(_operator.check, partial(_operator.run, _kernel)), _device)
