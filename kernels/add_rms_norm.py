"""normed = RMSNorm(x + residual) * weight in one Triton kernel that also returns the sum: device code and launcher.

A program holds a row in registers: each input is read once and each output written once, which is all that memory
bandwidth allows. With few rows most of the time is the launch, so, like the products, the kernel is set up while the
one ahead of it in the stream still runs, and waits for it inside (programmatic dependent launch). A row's result does
not depend on the other rows.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.launch import dependent_launch, launch, traits

_VECTOR_BYTES = 16
_MAX_WARPS = 32


def norm_warps(h: int, itemsize: int) -> int:
    """Warps for a row of h elements of `itemsize` bytes: a thread for every 16 bytes, so that the row is requested at
    once."""
    return min(max(1, triton.next_power_of_2(h) * itemsize // (32 * _VECTOR_BYTES)), _MAX_WARPS)


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    normed,
    total,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (M,). BLOCK is H rounded up to a power of two."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype: tl.constexpr = x.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * H + columns
    mask = columns < H
    scale = tl.load(weight + columns, mask=mask, other=0.0)
    parts = tl.load(x + at, mask=mask, other=0.0), tl.load(residual + at, mask=mask, other=0.0)
    added = (parts[0].to(tl.float32) + parts[1].to(tl.float32)).to(dtype)
    tl.store(total + at, added, mask=mask)
    wide = added.to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide) / H + eps)).to(dtype)
    tl.store(normed + at, (unit.to(tl.float32) * scale.to(tl.float32)).to(dtype), mask=mask)


def add_rms_norm(tokens: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launches the kernel for contiguous [M, H]; arguments as in `ops.add_rms_norm`, already checked there."""
    M, H = tokens.shape
    normed, total = (torch.empty(M, H, dtype=tokens.dtype, device=tokens.device) for _ in range(2))
    if tokens.numel():
        variant = "add_rms_norm", H, traits(tokens, residual, weight)
        arguments = tokens, residual, weight, normed, total, eps
        launch(_add_rms_norm, variant, (M, 1, 1), arguments, *_constants(H, tokens.element_size(), tokens.device))
    return normed, total


@cache
def _constants(h: int, itemsize: int, device: torch.device) -> tuple[dict, dict]:
    """Constants of the kernel and options of its compilation."""
    pdl = dependent_launch(device)
    constants = dict(H=h, BLOCK=triton.next_power_of_2(h), PDL=pdl)
    return constants, dict(num_warps=norm_warps(h, itemsize), launch_pdl=pdl)
