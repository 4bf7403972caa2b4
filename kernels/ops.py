"""The operators `rowint8::linear`, `rowint8::swiglu` and `rowint8::add_rms_norm`: all that the engines import.

All are `torch.library` operators, so `torch.compile` puts them into a graph as they are. CUDA tensors run the Triton
kernels; CPU tensors run ATen (`kernels/cpu.py`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rowint8.kernels import cpu

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("rowint8", "DEF")
_library.define("linear(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor")
_library.define("swiglu(Tensor x, Tensor values, Tensor scale) -> Tensor")
_library.define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")


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


def _check(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Raises ValueError unless the arguments fit together."""
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


def _check_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
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


def _check_halves(values: Tensor) -> None:
    if values.shape[0] % 2:
        raise ValueError(f"rowint8: a SwiGLU weight has as many gate rows as up rows; {values.shape[0]} is odd")


def _linear_fake(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, values, scale, bias)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _swiglu_fake(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    _check(x, values, scale)
    _check_halves(values)
    return x.new_empty(*x.shape[:-1], values.shape[0] // 2)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _run_linear(kernel: Callable, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, scale, bias)
    return _unflatten(kernel(_flatten(x), values, scale, bias), x)


def _run_swiglu(kernel: Callable, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    _check(x, values, scale)
    _check_halves(values)
    return _unflatten(kernel(_flatten(x), values, scale), x)


def _run_add_rms_norm(
    kernel: Callable, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check_norm(x, residual, weight)
    normed, total = kernel(_flatten(x), _flatten(residual), weight.contiguous(), eps)
    return _unflatten(normed, x), _unflatten(total, x)


def _flatten(x: Tensor) -> Tensor:
    """[..., K] to contiguous [M, K]."""
    return (x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])).contiguous()


def _unflatten(out: Tensor, x: Tensor) -> Tensor:
    """[M, N] to [..., N] with the leading dimensions of x."""
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def _linear_cpu(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return _run_linear(cpu.linear, x, values, scale, bias)


def _swiglu_cpu(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return _run_swiglu(cpu.swiglu, x, values, scale)


def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _run_add_rms_norm(cpu.add_rms_norm, x, residual, weight, eps)


def _linear_cuda(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    from rowint8.kernels.int8_linear import int8_linear

    return _run_linear(int8_linear, x, values, scale, bias)


def _swiglu_cuda(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    from rowint8.kernels.int8_swiglu import int8_swiglu

    return _run_swiglu(int8_swiglu, x, values, scale)


def _add_rms_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from rowint8.kernels.add_rms_norm import add_rms_norm as kernel

    return _run_add_rms_norm(kernel, x, residual, weight, eps)


torch.library.register_fake("rowint8::linear", _linear_fake, lib=_library)
torch.library.register_fake("rowint8::swiglu", _swiglu_fake, lib=_library)
torch.library.register_fake("rowint8::add_rms_norm", _add_rms_norm_fake, lib=_library)
_library.impl("linear", _linear_cpu, "CPU")
_library.impl("swiglu", _swiglu_cpu, "CPU")
_library.impl("add_rms_norm", _add_rms_norm_cpu, "CPU")
_library.impl("linear", _linear_cuda, "CUDA")
_library.impl("swiglu", _swiglu_cuda, "CUDA")
_library.impl("add_rms_norm", _add_rms_norm_cuda, "CUDA")
