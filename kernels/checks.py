"""Whether the arguments of an operator fit together: each function raises ValueError, in one line, unless they do."""

import torch
from torch import Tensor

from rowint8.kernels.activations import BLOCKS, LARGEST_K

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Raises ValueError unless the arguments of `linear` fit together."""
    check_dtype(x.dtype)
    check_weight(x, values, scale, bias)


def check_weight(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless the weight is one, and fits activations of any dtype."""
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


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"rowint8: activations are {dtype}; accepted are float32, bfloat16 and float16")


def check_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """Raises ValueError unless the arguments of `add_rms_norm` fit together."""
    check_dtype(x.dtype)
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


def check_swiglu(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Raises ValueError unless the arguments of `swiglu` fit together."""
    check_linear(x, values, scale)
    check_halves(values)


def check_halves(values: Tensor) -> None:
    if values.shape[0] % 2:
        raise ValueError(f"rowint8: a SwiGLU weight has as many gate rows as up rows; {values.shape[0]} is odd")


def check_tokens(x: Tensor, block: int) -> None:
    """Raises ValueError unless the arguments of `quantize_tokens` fit together."""
    check_dtype(x.dtype)
    if x.dim() == 0:
        raise ValueError("rowint8: activations must be [..., K], got a scalar")
    if block not in (1, *BLOCKS) or x.shape[-1] % block:
        raise ValueError(
            f"rowint8: cannot rotate {x.shape[-1]} columns in blocks of {block}; accepted are 1, which is no rotation, "
            f"and what divides the columns of {', '.join(map(str, BLOCKS))}"
        )


def check_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, block: int) -> None:
    """Raises ValueError unless the arguments of `add_rms_norm_int8` fit together."""
    check_norm(x, residual, weight, eps)
    check_tokens(x, block)


def check_linear_int8(
    tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    """Raises ValueError unless the arguments of `linear_int8` fit together."""
    check_dtype(dtype)
    if tokens.dtype != torch.int8:
        raise ValueError(f"rowint8: tokens must be int8, got {tokens.dtype}; quantize_tokens makes them")
    check_weight(tokens, values, scale, bias)
    if token_scale.dtype != torch.float32 or token_scale.shape != tokens.shape[:-1]:
        given = f"{token_scale.dtype} {list(token_scale.shape)}"
        raise ValueError(f"rowint8: token_scale must be float32 {list(tokens.shape[:-1])}, got {given}")
    if values.shape[1] > LARGEST_K:
        raise ValueError(f"rowint8: a weight of K = {values.shape[1]} inputs; int32 sums hold up to {LARGEST_K}")
    if token_scale.device != tokens.device:
        raise ValueError(f"rowint8: tokens are on {tokens.device}; their scales must be there too")


def check_swiglu_int8(tokens: Tensor, token_scale: Tensor, values: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless the arguments of `swiglu_int8` fit together."""
    check_linear_int8(tokens, token_scale, values, scale, None, dtype)
    check_halves(values)
