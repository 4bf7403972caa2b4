"""normed = RMSNorm(x + residual) * weight in one Triton kernel that also returns the sum: device code and launcher.

A program holds whole rows in registers: each input is read once and each output written once, which is all that memory
bandwidth allows. With few rows most of the time is the launch, so on Hopper, like the products, the kernel starts while
the one ahead of it in the stream still runs, and waits for it inside (programmatic dependent launch).
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.launch import dependent_launch


class NormConfig(NamedTuple):
    """A variant of the kernel."""

    rows: int
    """Rows per program."""
    num_warps: int


_MANY_ROWS = 512
_MAX_WARPS = 16
_VECTOR_BYTES = 16


@cache
def pick_norm_config(m: int, h: int, itemsize: int) -> NormConfig:
    """The variant for m rows of h elements of `itemsize` bytes. A result's last bits may differ between variants.

    Few rows: a thread for every 16 bytes of a row, so that the whole row is requested at once. Many rows keep the card
    busy anyway: four times as much per thread, in programs of at least four warps, which short rows share.
    """
    vectors = max(1, triton.next_power_of_2(h) * itemsize // _VECTOR_BYTES)
    if m < _MANY_ROWS:
        return NormConfig(1, min(max(1, vectors // 32), _MAX_WARPS))
    return NormConfig(max(1, 512 // vectors), min(max(4, vectors // 128), _MAX_WARPS))


@triton.jit(do_not_specialize=["M"])  # one compilation serves every number of rows
def _add_rms_norm(
    x,
    residual,
    weight,
    normed,
    total,
    eps,
    M,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(M, ROWS),). BLOCK is H rounded up to a power of two; `residual` may be None."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = rows[:, None] * H + columns[None, :]  # [R, B]
    mask = (rows < M)[:, None] & (columns < H)[None, :]
    scale = tl.load(weight + columns, mask=columns < H, other=0.0, eviction_policy="evict_last")[None, :]
    added = tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if residual is not None:
        other = tl.load(residual + at, mask=mask, other=0.0, eviction_policy="evict_first")
        added = (added.to(tl.float32) + other.to(tl.float32)).to(dtype)
    tl.store(total + at, added, mask=mask)
    wide = added.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) / H  # [R]
    unit = (wide * tl.rsqrt(mean_square + eps)[:, None]).to(dtype)
    tl.store(normed + at, (unit.to(tl.float32) * scale.to(tl.float32)).to(dtype), mask=mask)


def add_rms_norm(tokens: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launches the kernel for contiguous [M, H]; arguments as in `ops.add_rms_norm`, already checked there."""
    M, H = tokens.shape
    normed, total = (torch.empty(M, H, dtype=tokens.dtype, device=tokens.device) for _ in range(2))
    if tokens.numel():
        config = pick_norm_config(M, H, tokens.element_size())
        variant: dict[str, Any] = dict(H=H, BLOCK=triton.next_power_of_2(H), ROWS=config.rows)
        variant |= dict(num_warps=config.num_warps, **dependent_launch(tokens.device))
        grid = (triton.cdiv(M, config.rows),)
        _add_rms_norm[grid](tokens, residual, weight, normed, total, eps, M, **variant)
    return normed, total
