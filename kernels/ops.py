"""The operators `rowint8::linear`, `rowint8::swiglu` and `rowint8::add_rms_norm`: all that the engines import.

All are `torch.library` operators, so `torch.compile` puts them into a graph as they are. CUDA tensors run the kernel
that `dispatch` chooses, CPU tensors ATen (`cpu`). A new operator is an entry of `_OPERATORS`; a product is also one of
`dispatch.OPERATORS`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.kernels import cpu

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = (x @ values^T) * scale + bias, accumulated in fp32.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        values: int8 [N, K], contiguous.
        scale: fp16 [N].
        bias: [N] in any floating dtype, or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return torch.ops.rowint8.linear.default(x, values, scale, bias)


def swiglu(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """out = silu(x @ gate^T) * (x @ up^T), where gate is the first half of the rows of the weight and up the second.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        values: int8 [2I, K], contiguous.
        scale: fp16 [2I].

    Returns:
        [..., I] in x's dtype. On CUDA the gate and up products stay in fp32, and nothing of shape [..., 2I] is
        written; on the CPU they are rounded to x's dtype first.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return torch.ops.rowint8.swiglu.default(x, values, scale)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """total = x + residual; normed = total / sqrt(mean(total^2) + eps) * weight over the last dimension.

    Rounds where Hugging Face's `LlamaRMSNorm` of the eager `x + residual` does, since models are published with what
    that computes: the sum once to x's dtype; from this rounded sum the normalized row in fp32, rounded to x's dtype;
    its product with the weight, rounded again. In 16 bits `torch.nn.functional.rms_norm` differs in the last place, as
    it multiplies in fp32 and rounds once. vLLM's CUDA `fused_add_rms_norm` rounds the sum as here; some of its versions
    multiply as here, others in fp32. Its native code does not round the sum before it normalizes.

    Args:
        x: fp32, bf16 or fp16 [..., H].
        residual: as x.
        weight: [H] in x's dtype.
        eps: added to the mean of squares.

    Returns:
        (normed, total), both [..., H] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return torch.ops.rowint8.add_rms_norm.default(x, residual, weight, eps)


def _check_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Raises ValueError unless the arguments of `linear` fit together."""
    _check_dtype(x)
    if values.dtype != torch.int8 or values.dim() != 2 or not values.is_contiguous():
        raise ValueError(
            f"rowint8: values must be a contiguous int8 matrix [N, K], got {values.dtype} {list(values.shape)}"
        )
    if scale.dtype != torch.float16 or scale.shape != values.shape[:1]:
        raise ValueError(f"rowint8: scale must be float16 [{values.shape[0]}], got {scale.dtype} {list(scale.shape)}")
    if x.dim() == 0 or x.shape[-1] != values.shape[1]:
        raise ValueError(f"rowint8: activations {list(x.shape)} do not match a weight of K = {values.shape[1]} inputs")
    if bias is not None and bias.shape != scale.shape:
        raise ValueError(f"rowint8: bias must be [{values.shape[0]}], got {list(bias.shape)}")
    if any(t is not None and t.device != x.device for t in (values, scale, bias)):
        raise ValueError(f"rowint8: activations are on {x.device}; weight and bias must be there too")


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"rowint8: activations are {x.dtype}; accepted are float32, bfloat16 and float16")


def _check_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """Raises ValueError unless the arguments of `add_rms_norm` fit together."""
    _check_dtype(x)
    if x.dim() == 0:
        raise ValueError("rowint8: activations must be [..., H], got a scalar")
    if residual.dtype != x.dtype or residual.shape != x.shape:
        given = f"{residual.dtype} {list(residual.shape)}"
        raise ValueError(f"rowint8: residual must be {x.dtype} {list(x.shape)} as the activations are, got {given}")
    if weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        given = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"rowint8: norm weight must be {x.dtype} [{x.shape[-1]}] to fit the activations, got {given}")
    if any(t.device != x.device for t in (residual, weight)):
        raise ValueError(f"rowint8: activations are on {x.device}; residual and norm weight must be there too")


def _check_swiglu(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Raises ValueError unless the arguments of `swiglu` fit together."""
    _check_linear(x, values, scale)
    if values.shape[0] % 2:
        raise ValueError(f"rowint8: a SwiGLU weight has as many gate rows as up rows; {values.shape[0]} is odd")


def _product(kernel: Callable[..., Tensor], x: Tensor, *weight: Tensor | None) -> Tensor:
    """Runs a kernel of [M, K] activations for any leading dimensions."""
    return _unflatten(kernel(_flatten(x), *weight), x)


def _norm(
    kernel: Callable[..., tuple[Tensor, Tensor]], x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Runs a kernel of contiguous [M, H] activations for any leading dimensions and strides."""
    normed, total = kernel(_flatten(x), _flatten(residual), weight.contiguous(), eps)
    return _unflatten(normed, x), _unflatten(total, x)


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


class _Operator(NamedTuple):
    schema: str
    check: Callable[..., None]
    """Raises ValueError unless the arguments fit together."""
    outputs: Callable[..., Any]
    """Outputs for arguments that have no memory."""
    run: Callable[..., Any]
    """Brings the arguments into the shape that the kernels take, and their outputs into that of the caller."""
    cpu: Callable[..., Any]
    cuda: Callable[..., Any]


_OPERATORS = {
    "linear": _Operator(
        "(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor",
        check=_check_linear,
        outputs=lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0]),
        run=_product,
        cpu=cpu.linear,
        cuda=partial(_product_cuda, "linear"),
    ),
    "swiglu": _Operator(
        "(Tensor x, Tensor values, Tensor scale) -> Tensor",
        check=_check_swiglu,
        outputs=lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0] // 2),
        run=_product,
        cpu=cpu.swiglu,
        cuda=partial(_product_cuda, "swiglu"),
    ),
    "add_rms_norm": _Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        check=_check_norm,
        outputs=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
        run=_norm,
        cpu=cpu.add_rms_norm,
        cuda=_add_rms_norm_cuda,
    ),
}


def _checked(check: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    """`then`, for arguments that fit together."""

    def operator(*given: Any) -> Any:
        check(*given)
        return then(*given)

    return operator


_library = torch.library.Library("rowint8", "DEF")
for _name, _operator in _OPERATORS.items():
    _library.define(_name + _operator.schema)
    torch.library.register_fake(f"rowint8::{_name}", _checked(_operator.check, _operator.outputs), lib=_library)
    for _device, _kernel in (("CPU", _operator.cpu), ("CUDA", _operator.cuda)):
        _library.impl(_name, _checked(_operator.check, partial(_operator.run, _kernel)), _device)
