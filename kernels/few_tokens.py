# type: ignore  # Gluon's own types do not describe device code
"""The INT8 product for up to 8 tokens, in Gluon: device code and launcher.

Weights go from memory to registers to tensor cores, and nowhere else.

A program has 16 weight rows and all tokens. Its warps take turns along K, and their sums are added at the end. There is
no pipeline: a warp asks for all of its block and waits, and the many warps of a multiprocessor hide each other's waits.

What makes it cheap is the order of K. A tensor core wants from each thread four values of a row, two and two, eight
apart; memory wants 16 neighbours at once. As a sum does not care for its order, a thread's 16 neighbours are declared
to be its four values in four multiplications, in the weight and in the tokens alike. No value ever changes threads.

"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.int8_convert import FOUR_TO_BF16, FOUR_TO_FP16
from rowint8.kernels.launch import blocks, dependent_launch, launch, traits
from rowint8.kernels.shared_device_code import silu_times
from rowint8.kernels.tiles.types import FewTokensTile

ROWS = gl.constexpr(16)
"""Weight rows of a program: the height of the multiplication."""
TOKENS = gl.constexpr(8)
"""Its width."""
_RUN = gl.constexpr(16)
"""Neighbours in K that a thread loads: 16 bytes of the weight."""
_QUAD = gl.constexpr(64)
"""Neighbours in K of the four threads that share a row."""


@gluon.jit(do_not_specialize=["M"])
def few_tokens_kernel(
    x,
    values,
    scale,
    bias,
    out,
    M,
    N,
    K,
    HAS_BIAS: gl.constexpr,
    FUSED: gl.constexpr,
    WARPS: gl.constexpr,
    CHUNK: gl.constexpr,
    EVEN_K: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (cdiv(N, ROWS),). out: [M, N], or [M, N / 2] for SwiGLU. CHUNK: K of a warp at a time."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 1, _RUN], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    OF_ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LOAD))
    STEP: gl.constexpr = WARPS * CHUNK
    if PDL:
        gdc_launch_dependents()
    rows = _rows(N, FUSED, OF_ROWS).to(gl.int64)
    tokens = gl.arange(0, TOKENS, OF_ROWS)
    turns = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LOAD))) * CHUNK
    ks = turns[:, None, None] + gl.arange(0, CHUNK, gl.SliceLayout(0, gl.SliceLayout(1, LOAD)))[None, None, :]
    w_ptrs = values + rows[None, :, None] * K + ks
    x_ptrs = x + tokens[None, :, None] * K + ks
    is_token = (tokens < M)[None, :, None]
    w = _weight_block(w_ptrs, ks, K, EVEN_K)
    if PDL:
        gdc_wait()  # for the tokens; the first weights, which no kernel writes, are on their way
    acc = gl.zeros([WARPS, ROWS, TOKENS], gl.float32, MMA)
    acc = _multiplied(w, x_ptrs, is_token, ks, K, acc, EVEN_K, MMA)
    for k in range(STEP, K, STEP):
        w_ptrs += STEP
        x_ptrs += STEP
        w = _weight_block(w_ptrs, ks, K - k, EVEN_K)
        acc = _multiplied(w, x_ptrs, is_token, ks, K - k, acc, EVEN_K, MMA)
    _finish(gl.sum(acc, axis=0), scale, bias, out, M, N, HAS_BIAS, FUSED)


@gluon.jit
def _rows(N, FUSED: gl.constexpr, LAYOUT: gl.constexpr):
    """Weight rows of this program, in range; for SwiGLU eight gate rows over their eight up rows, which is how the sums
    of a thread lie."""
    r = gl.arange(0, ROWS, LAYOUT)
    if FUSED:
        rows = gl.minimum(gl.program_id(0) * (ROWS // 2) + r % 8, N // 2 - 1) + r // 8 * (N // 2)
    else:
        rows = gl.minimum(gl.program_id(0) * ROWS + r, N - 1)
    return rows


@gluon.jit
def _weight_block(w_ptrs, ks, left, EVEN_K: gl.constexpr):
    """[WARPS, ROWS, CHUNK] weights, of which `left` columns are there."""
    if EVEN_K:
        w = gl.load(w_ptrs, eviction_policy="evict_first")
    else:
        w = gl.load(w_ptrs, mask=ks < left, other=0, eviction_policy="evict_first")
    return w


@gluon.jit
def _multiplied(w, x_ptrs, is_token, ks, left, acc, EVEN_K: gl.constexpr, MMA: gl.constexpr):
    """The sums with a block of weights times its tokens added."""
    if EVEN_K:
        xt = gl.load(x_ptrs, mask=is_token, other=0.0)
    else:
        xt = gl.load(x_ptrs, mask=is_token & (ks < left), other=0.0)
    return mma_v2(_left(_widened(w, xt), MMA), _right(xt, MMA), acc)


@gluon.jit
def _left(w, MMA: gl.constexpr):
    """[WARPS, ROWS, CHUNK] as the left operand, K in the order of the module's docstring."""
    W: gl.constexpr = w.shape[0]
    CHUNK: gl.constexpr = w.shape[2]
    parts = w.reshape([W, ROWS, CHUNK // _QUAD, 4, 4, 2, 2]).permute((0, 1, 2, 4, 5, 3, 6)).reshape([W, ROWS, CHUNK])
    return gl.convert_layout(parts, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _right(xt, MMA: gl.constexpr):
    """[WARPS, TOKENS, CHUNK] as the right operand [WARPS, CHUNK, TOKENS], in the same order of K."""
    W: gl.constexpr = xt.shape[0]
    CHUNK: gl.constexpr = xt.shape[2]
    parts = xt.reshape([W, TOKENS, CHUNK // _QUAD, 4, 4, 2, 2]).permute((0, 2, 4, 5, 3, 6, 1))
    return gl.convert_layout(parts.reshape([W, CHUNK, TOKENS]), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def _widened(w, xt):
    """INT8 values in the dtype of the tokens, bf16 or fp16, exactly."""
    ASM: gl.constexpr = FOUR_TO_BF16 if xt.dtype == gl.bfloat16 else FOUR_TO_FP16
    return gl.inline_asm_elementwise(ASM, "=&r,=&r,r", [w], dtype=xt.dtype, is_pure=True, pack=4)


@gluon.jit
def _finish(acc, scale, bias, out, M, N, HAS_BIAS: gl.constexpr, FUSED: gl.constexpr):
    """Scales the sums [ROWS, TOKENS], adds the bias or takes silu(gate) * up, and stores the result."""
    rows = _rows(N, FUSED, gl.SliceLayout(1, acc.type.layout))
    acc *= gl.load(scale + rows).to(gl.float32)[:, None]
    if HAS_BIAS:
        acc += gl.load(bias + rows).to(gl.float32)[:, None]
    if FUSED:
        gate, up = acc.reshape([2, ROWS // 2, TOKENS]).permute((1, 2, 0)).split()
        _store(silu_times(gate, up), out, M, N // 2)
    else:
        _store(acc, out, M, N)


@gluon.jit
def _store(result, out, M, N):
    R: gl.constexpr = result.shape[0]
    n = gl.program_id(0) * R + gl.arange(0, R, gl.SliceLayout(1, result.type.layout))
    tokens = gl.arange(0, TOKENS, gl.SliceLayout(0, result.type.layout))
    ptrs = out + tokens.to(gl.int64)[None, :] * N + n[:, None]
    gl.store(ptrs, result.to(out.dtype.element_ty), mask=(n < N)[:, None] & (tokens < M)[None, :])


_REGISTERS = 168
"""A limit that is never reached. Without one, ptxas saves registers by asking for a block of the weight piece by piece,
and waiting each time."""


def few_tokens_product(
    tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, tile: FewTokensTile, fused: bool = False
) -> Tensor:
    """linear, or swiglu where `fused`, of contiguous 16-bit [M, K] activations, M at most 8; N and K are at least 1.

    Arguments as in `ops.linear`; compute capability 8.0 and newer.
    """
    (M, K), N = tokens.shape, values.shape[0]
    out = torch.empty(M, N // 2 if fused else N, dtype=tokens.dtype, device=tokens.device)
    variant = "few_tokens", fused, tile, N, K, traits(tokens, values, scale, bias)
    constants, options = _constants(tile, K, tokens.device, bias is not None, fused)
    grid = blocks(N, ROWS.value), 1, 1
    launch(few_tokens_kernel, variant, grid, (tokens, values, scale, bias, out, M, N, K), constants, options)
    return out


@cache
def _constants(
    tile: FewTokensTile, k: int, device: torch.device, has_bias: bool, fused: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    pdl = dependent_launch(device)
    sizes = dict(WARPS=tile.warps, CHUNK=tile.block_k // tile.warps, EVEN_K=k % tile.block_k == 0)
    options = dict(num_warps=tile.warps, maxnreg=_REGISTERS, launch_pdl=pdl)
    return dict(HAS_BIAS=has_bias, FUSED=fused, **sizes, PDL=pdl), options
