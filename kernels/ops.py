"""The operators `rowint8::linear`, `rowint8::swiglu` and `rowint8::add_rms_norm`, and those of INT8 activations
(`quantize_tokens`, `linear_int8`, `swiglu_int8`, `add_rms_norm_int8`): all that the engines import.

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

from rowint8.kernels import checks, cpu, cpu_int8
from rowint8.kernels.experts.checks import check_experts, check_experts_int8
from rowint8.kernels.experts.cpu import experts as experts_cpu
from rowint8.kernels.experts.cpu import experts_int8 as experts_int8_cpu


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


def quantize_tokens(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rotates and rounds each token to INT8; `activations` says how.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        block: columns that are rotated together, as in the weight: one of `activations.BLOCKS` that divides K, or 1.

    Returns:
        (int8 [..., K], fp32 [...]): the token in INT8 and its scale, NaN where the token has NaN or Inf.

    Raises:
        ValueError: dtype or block do not fit.
    """
    return torch.ops.rowint8.quantize_tokens.default(x, block)


def linear_int8(
    tokens: Tensor,
    token_scale: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """out = token_scale * (scale * (tokens @ values^T)) + bias: the product exact in int32, the rest in fp32.

    Args:
        tokens: int8 [..., K], with `token_scale` fp32 [...], of `quantize_tokens`.
        values: int8 [N, K], contiguous, rotated by the same block.
        scale: fp16 [N].
        bias: [N] in any floating dtype, or None.
        dtype: fp32, bf16 or fp16.

    Returns:
        [..., N] in `dtype`, rounded once; a token's numbers do not depend on the other tokens.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return torch.ops.rowint8.linear_int8.default(tokens, token_scale, values, scale, bias, dtype)


def swiglu_int8(
    tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """out = silu(gate) * up of the two halves of `linear_int8`, in fp32 until it is rounded once.

    Args:
        values: int8 [2I, K], gate rows over up rows; all else as `linear_int8`.

    Returns:
        [..., I] in `dtype`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return torch.ops.rowint8.swiglu_int8.default(tokens, token_scale, values, scale, dtype)


def add_rms_norm_int8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_tokens` of what `add_rms_norm` returns, bit for bit, in one pass over memory on CUDA.

    Args:
        as `add_rms_norm` and `quantize_tokens`.

    Returns:
        (int8 [..., H], fp32 [...], total [..., H] in x's dtype).

    Raises:
        ValueError: shapes, dtypes, devices or block do not fit together.
    """
    return torch.ops.rowint8.add_rms_norm_int8.default(x, residual, weight, eps, block)


def experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """A mixture of experts: the sum over each token's k experts of weight * down(activation(gate_up(x))).

    Sums of products are in fp32. What is between them, and on CUDA each expert's weighted output, is rounded to x's
    dtype; their sum is in fp32, in a fixed order, and rounded once: the same input gives the same bits.

    Args:
        x: fp32, bf16 or fp16 [..., H].
        gate_up: int8 [E, 2I, H], contiguous: gate rows over up rows, for "swigluoai" in turns.
        gate_up_scale: fp16 [E, 2I].
        down: int8 [E, H, I], contiguous.
        down_scale: fp16 [E, H].
        weights: [..., k] in any floating dtype.
        ids: int32 or int64 [..., k], each below E, or below the length of `expert_map`. Negative ones are left out.
        gate_up_bias, down_bias: [E, 2I] and [E, H] in any floating dtype, or None.
        expert_map: int32 or int64, where among the E of this GPU each expert is; -1 for those that are left out.
        activation: "silu", silu(gate) * up; or "swigluoai", gate * sigmoid(alpha * gate) * (up + 1).
        limit: gate is first cut to at most this and up to at most this either way; None cuts nothing.

    Returns:
        [..., H] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    given = gate_up_bias, down_bias, expert_map, activation, alpha, limit
    return torch.ops.rowint8.experts.default(x, gate_up, gate_up_scale, down, down_scale, weights, ids, *given)


def experts_int8(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_map: Tensor | None,
    block: int,
    hidden_block: int,
) -> Tensor:
    """`experts` of "silu" without biases, with tokens and what is between the products rounded to INT8 as in
    `quantize_tokens`. A token's result does not depend on the other tokens.

    Args:
        block, hidden_block: of the rotation of gate_up's and of down's columns; all else as in `experts`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; or a card of another compute capability than 9.0,
            fp32, or sizes off 16 on a GPU.
    """
    given = gate_up, gate_up_scale, down, down_scale, weights, ids, expert_map, block, hidden_block
    return torch.ops.rowint8.experts_int8.default(x, *given)


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
        check=checks.check_linear,
        outputs=lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0]),
        run=_product,
        cpu=cpu.linear,
        cuda=partial(_product_cuda, "linear"),
    ),
    "swiglu": _Operator(
        "(Tensor x, Tensor values, Tensor scale) -> Tensor",
        check=checks.check_swiglu,
        outputs=lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0] // 2),
        run=_product,
        cpu=cpu.swiglu,
        cuda=partial(_product_cuda, "swiglu"),
    ),
    "add_rms_norm": _Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        check=checks.check_norm,
        outputs=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
        run=_norm,
        cpu=cpu.add_rms_norm,
        cuda=_add_rms_norm_cuda,
    ),
    "quantize_tokens": _Operator(
        "(Tensor x, int block) -> (Tensor, Tensor)",
        check=checks.check_tokens,
        outputs=lambda x, _: (x.new_empty(x.shape, dtype=torch.int8), _scales(x)),
        run=_quantize,
        cpu=cpu_int8.quantize_tokens,
        cuda=_quantize_tokens_cuda,
    ),
    "linear_int8": _Operator(
        "(Tensor tokens, Tensor token_scale, Tensor values, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
        check=checks.check_linear_int8,
        outputs=lambda x, _, values, *given: x.new_empty(*x.shape[:-1], values.shape[0], dtype=given[-1]),
        run=_product_int8,
        cpu=cpu_int8.linear,
        cuda=_linear_int8_cuda,
    ),
    "swiglu_int8": _Operator(
        "(Tensor tokens, Tensor token_scale, Tensor values, Tensor scale, ScalarType dtype) -> Tensor",
        check=checks.check_swiglu_int8,
        outputs=lambda x, _, values, *given: x.new_empty(*x.shape[:-1], values.shape[0] // 2, dtype=given[-1]),
        run=_product_int8,
        cpu=cpu_int8.swiglu,
        cuda=_swiglu_int8_cuda,
    ),
    "add_rms_norm_int8": _Operator(
        "(Tensor x, Tensor residual, Tensor weight, float eps, int block) -> (Tensor, Tensor, Tensor)",
        check=checks.check_norm_int8,
        outputs=lambda x, *_: (x.new_empty(x.shape, dtype=torch.int8), _scales(x), x.new_empty(x.shape)),
        run=_norm_int8,
        cpu=cpu_int8.add_rms_norm,
        cuda=_add_rms_norm_int8_cuda,
    ),
    "experts": _Operator(
        "(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor weights, Tensor ids, "
        "Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? expert_map=None, str activation='silu', "
        "float alpha=1.702, float? limit=None) -> Tensor",
        check=check_experts,
        outputs=lambda x, *_: x.new_empty(x.shape),
        run=_experts,
        cpu=experts_cpu,
        cuda=_experts_cuda,
    ),
    "experts_int8": _Operator(
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
for _name, _operator in _OPERATORS.items():
    _library.define(_name + _operator.schema)
    torch.library.register_fake(f"rowint8::{_name}", _checked(_operator.check, _operator.outputs), lib=_library)
    for _device, _kernel in (("CPU", _operator.cpu), ("CUDA", _operator.cuda)):
        _library.impl(_name, _checked(_operator.check, partial(_operator.run, _kernel)), _device)
