"""The operators as functions: `linear`, `swiglu` and `add_rms_norm`, those of INT8 activations (`quantize_tokens`,
`linear_int8`, `swiglu_int8`, `add_rms_norm_int8`), and `experts`. They are all that the engines import; `operators`
defines them.
"""

import torch
from torch import Tensor

from rowint8.kernels import operators  # noqa: F401 (defines them)


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
