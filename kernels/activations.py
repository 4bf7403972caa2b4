"""INT8 activations: a token is rotated, rounded to INT8 with a scale of its own, and multiplied by rotated INT8 rows.

    x W^T = (x H) (W H)^T                          H orthonormal, so the product is that of the plain operands
    y        = x H sqrt(B)                         butterflies of additions and subtractions, fp32
    absmax   = max(max_k |y[k]|, 2^-100)
    q[k]     = round(y[k] * (127 / absmax))        half to even, in [-127, 127]
    scale    = absmax * (1 / (127 sqrt(B)))        fp32, one a token
    sum[n]   = sum_k q[k] * values[n, k]           int32, exact over all of K, up to K = 133,144
    out[n]   = scale * (row_scale[n] * sum[n])     fp32, with a bias as one fused multiply-add, then rounded once

H is block diagonal: the Hadamard matrix of size B (Sylvester's order, symmetric, H H = I) on each run of B columns. It
spreads an outlier of a token over its block, so that one scale serves the whole token (QuaRot, arXiv:2404.00456).

A token's result depends on that token alone, and is the same bits whatever the batch, the tile or the split of K.
A zero token is zeros. A token with NaN or Inf has q = 0 and the scale NaN, which makes all its outputs NaN.
"""

import math

import torch
from torch import Tensor

INT8_MAX = 127
BLOCKS = (16, 32, 64, 128, 256)
"""Columns that can be rotated together."""
LARGEST_BLOCK = BLOCKS[-1]
"""K of most models divided among eight ranks still has whole blocks of this size."""
ROTATED_BY = "rotation_block"
"""Metadata of a safetensors file whose INT8 rows are rotated: the largest block, as its config.json gives it."""
LARGEST_K = (2**31 - 1) // INT8_MAX**2
"""Inputs of a weight up to which int32 holds every sum."""
LEAST_ABSMAX = 2.0**-100
"""Keeps 127 / absmax finite; what a smaller token adds to any output is far below fp32's smallest number."""


def rotation_block(k: int, largest: int = LARGEST_BLOCK) -> int:
    """Columns that are rotated together in a weight of K inputs: the largest power of two that divides K, at most
    `largest`, itself a power of two. 1, which is no rotation, where that is below 16."""
    block = math.gcd(k, largest)
    return block if block in BLOCKS else 1


def check_rotation(file: object, metadata: dict[str, str] | None, expected: int | None) -> None:
    """ValueError unless a file's rows are rotated by blocks of `expected`, or, where that is None, not at all.

    The rows themselves do not show it, and products of others mean nothing.
    """
    block = (metadata or {}).get(ROTATED_BY)
    if block != (expected and str(expected)):
        rows, asked = ("are not rotated" if each is None else f"are rotated by {each}" for each in (block, expected))
        raise ValueError(
            f"{file}: its rows {rows}, and the config asks for rows that {asked}; leave activations and rotation_block "
            "in quantization_config as `rowint8 quantize` wrote them, or quantize the model again"
        )


def rotate(x: Tensor, block: int) -> Tensor:
    """x H, fp32 [..., K]; `block`, a power of two, divides K. Applied twice it gives x back, but for rounding."""
    return _butterflies(x.float(), block) * (1 / math.sqrt(block))


def quantize_tokens(tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(int8 [..., K], fp32 [...]) from activations [..., K]; see the module."""
    rotated = _butterflies(tokens.float(), block)
    absmax = rotated.abs().amax(-1) if rotated.shape[-1] else rotated.new_zeros(rotated.shape[:-1])
    finite = absmax.isfinite()
    absmax = absmax.clamp(min=LEAST_ABSMAX)
    inverse = torch.full_like(absmax, INT8_MAX) / absmax  # of a Python number torch would take the reciprocal first
    q = (rotated * inverse[..., None]).round_().where(finite[..., None], 0).to(torch.int8)
    return q, (absmax * scale_factor(block)).where(finite, math.nan)


def scale_factor(block: int) -> float:
    """A token's scale over the largest magnitude of its unnormalised rotation; kernels round it once to fp32."""
    return 1 / (INT8_MAX * math.sqrt(block))


def _butterflies(x: Tensor, block: int) -> Tensor:
    """x H sqrt(block), fp32 [..., K]: stages h = 1, 2, 4, ... replace pairs that lie h apart by sum, difference."""
    h = 1
    while h < block:
        low, high = x.unflatten(-1, (x.shape[-1] // (2 * h), 2, h)).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        h *= 2
    return x
