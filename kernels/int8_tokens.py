# type: ignore  # Gluon's own types do not describe device code
"""Tokens rotated and rounded to INT8 with a scale each, alone or behind the norm that makes them: device code in Gluon
and launchers. `activations` says what is computed.

A program holds a token in registers: it is read once, and its INT8 form written once. Eight neighbours lie in a thread
and a block of the rotation within a warp, so the butterflies of the transform are additions in registers and shuffles
between lanes, without shared memory. A token's result does not depend on the other tokens.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.activations import LEAST_ABSMAX, scale_factor
from rowint8.kernels.launch import dependent_launch, launch, traits

_NEIGHBOURS = gl.constexpr(8)
_CHUNK = 256
"""Columns of a warp at a time, where nothing is rotated."""
_MAX_WARPS = 16
_DIVIDE = gl.constexpr("div.rn.f32 $0, $1, $2;")
_SHUFFLE = gl.constexpr("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;")
_RSQRT = gl.constexpr("rsqrt.approx.f32 $0, $1;")
_ROUND = gl.constexpr(
    """{
        .reg .f32 a, b, c, d;
        .reg .s32 i, j, k, l;
        mul.rn.f32 a, $1, $5;
        mul.rn.f32 b, $2, $6;
        mul.rn.f32 c, $3, $7;
        mul.rn.f32 d, $4, $8;
        cvt.rni.s32.f32 i, a;
        cvt.rni.s32.f32 j, b;
        cvt.rni.s32.f32 k, c;
        cvt.rni.s32.f32 l, d;
        prmt.b32 i, i, j, 0x0040;
        prmt.b32 k, k, l, 0x0040;
        prmt.b32 $0, i, k, 0x5410;
    }"""
)
"""Four numbers times 127 / absmax, half to even, in one register. The product is rounded before it becomes whole."""


@gluon.jit
def _int8_tokens_kernel(
    x,
    residual,
    weight,
    times,
    out,
    scale,
    total,
    eps,
    factor,
    least,
    K: gl.constexpr,
    BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    CHUNK: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (M,). A token is [ROWS, CHUNK], K of it there. BLOCK 1 rotates nothing. No `weight`, no norm; `times`
    [M] multiplies the scales."""
    LANES: gl.constexpr = CHUNK // _NEIGHBOURS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, _NEIGHBOURS], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    if PDL:
        gdc_launch_dependents()
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    within = gl.arange(0, CHUNK, gl.SliceLayout(0, LAYOUT))
    columns = rows[:, None] * CHUNK + within[None, :]
    mask = columns < K
    if weight is not None:
        factors = gl.load(weight + columns, mask=mask, other=0.0).to(gl.float32)
    if PDL:
        gdc_wait()
    token = gl.program_id(0).to(gl.int64)
    at = token * K + columns
    y = gl.load(x + at, mask=mask, other=0.0).to(gl.float32)
    if weight is not None:
        dtype: gl.constexpr = x.dtype.element_ty
        added = (y + gl.load(residual + at, mask=mask, other=0.0).to(gl.float32)).to(dtype)
        gl.store(total + at, added, mask=mask)
        y = _normed(added.to(gl.float32), factors, eps, K, dtype)
    y = _rotated(y, within, BLOCK)
    bits = y.to(gl.int32, bitcast=True) & 0x7FFFFFFF  # as whole numbers NaN and Inf are the largest
    largest = gl.max(gl.max(bits, axis=1), axis=0)
    finite = largest < 0x7F800000
    absmax = gl.maximum(gl.where(finite, largest, 0).to(gl.float32, bitcast=True), least)
    inverse = gl.inline_asm_elementwise(_DIVIDE, "=f,f,f", [127.0, absmax], dtype=gl.float32, is_pure=True, pack=1)
    spread = gl.zeros_like(y) + gl.where(finite, inverse, 0.0)
    whole = gl.inline_asm_elementwise(_ROUND, "=r,f,f,f,f,f,f,f,f", [y, spread], dtype=gl.int8, is_pure=True, pack=4)
    gl.store(out + at, whole, mask=mask)
    found = gl.where(finite, absmax * factor, float("nan"))
    if times is not None:
        found *= gl.load(times + token)
    gl.store(scale + token, found)


@gluon.jit
def _normed(wide, factors, eps, K: gl.constexpr, dtype: gl.constexpr):
    """As `add_rms_norm` has it, in fp32 again."""
    mean = gl.sum(gl.sum(wide * wide, axis=1), axis=0) / K
    inverse = gl.inline_asm_elementwise(_RSQRT, "=f,f", [mean + eps], dtype=gl.float32, is_pure=True, pack=1)
    unit = (wide * inverse).to(dtype).to(gl.float32)
    return (unit * factors).to(dtype).to(gl.float32)


@gluon.jit
def _rotated(y, within, BLOCK: gl.constexpr):
    """Butterflies (a, b) -> (a + b, a - b) of neighbours 1, 2, 4, ... BLOCK / 2 apart."""
    for bit in gl.static_range(3):
        if 2**bit < BLOCK:
            y = _within_thread(y, 2**bit)
    for bit in gl.static_range(3, 8):
        if 2**bit < BLOCK:
            y = _between_lanes(y, within, bit)
    return y


@gluon.jit
def _within_thread(y, STEP: gl.constexpr):
    pairs = y.reshape([y.shape[0], y.shape[1] // (2 * STEP), 2, STEP]).permute((0, 1, 3, 2))
    a, b = pairs.split()
    both = gl.join(a + b, a - b).permute((0, 1, 3, 2)).reshape([y.shape[0], y.shape[1]])
    return gl.convert_layout(both, y.type.layout, assert_trivial=True)


@gluon.jit
def _between_lanes(y, within, BIT: gl.constexpr):
    apart = gl.full_like(y, 2**BIT // _NEIGHBOURS, dtype=gl.int32)
    other = gl.inline_asm_elementwise(_SHUFFLE, "=f,f,r", [y, apart], dtype=gl.float32, is_pure=True, pack=1)
    sign = (1 - 2 * ((within >> BIT) & 1)).to(gl.float32)
    return other + y * sign[None, :]


def quantize_tokens(tokens: Tensor, block: int, times: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launches the kernel for contiguous [M, K]; arguments as in `ops.quantize_tokens`, already checked there.

    Args:
        times: fp32 [M], by which each token's scale is multiplied in the end; None for 1.
    """
    return _launch("quantize_tokens", tokens, None, None, 0.0, block, times)[:2]


def add_rms_norm_int8(
    tokens: Tensor, residual: Tensor, weight: Tensor, eps: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches it for contiguous [M, H]; arguments as in `ops.add_rms_norm_int8`, already checked there."""
    out, scale, total = _launch("add_rms_norm_int8", tokens, residual, weight, eps, block)
    assert total is not None
    return out, scale, total


def _launch(
    name: str,
    tokens: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    block: int,
    times: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    M, K = tokens.shape
    out = torch.empty(M, K, dtype=torch.int8, device=tokens.device)
    scale = torch.empty(M, dtype=torch.float32, device=tokens.device)
    total = None if weight is None else torch.empty_like(tokens)
    if tokens.numel():
        arguments = tokens, residual, weight, times, out, scale, total, eps, scale_factor(block), LEAST_ABSMAX
        variant = name, K, block, traits(tokens, residual, weight, times)
        launch(_int8_tokens_kernel, variant, (M, 1, 1), arguments, *_constants(K, block, tokens.device))
    return out, scale, total


@cache
def _constants(k: int, block: int, device: torch.device) -> tuple[dict, dict]:
    """Constants of the kernel and options of its compilation."""
    pdl = dependent_launch(device)
    chunk = block if block > 1 else _CHUNK
    rows = triton.next_power_of_2(-(-k // chunk))
    warps = min(_MAX_WARPS, max(1, rows * chunk // 256))
    return dict(K=k, BLOCK=block, ROWS=rows, CHUNK=chunk, WARPS=warps, PDL=pdl), dict(num_warps=warps, launch_pdl=pdl)
