"""The INT8 product of one token in Triton, on CUDA cores: device code. `triton_matmul` launches it."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.int8_convert import FOUR_TO_FP32
from rowint8.kernels.shared_device_code import silu_times, weight_rows

_RUN = tl.constexpr(8)
"""Neighbours in K of a 16-byte load of 16-bit activations."""


@triton.jit
def vector_product(
    x,
    values,
    rows,
    token,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """acc[BN] = values[rows] @ x[token] in fp32 for int64 rows [BN]: on CUDA cores, as one token leaves tensor cores
    nothing to win.

    A thread loads _RUN neighbours of a row, as many as of the token in one load, and adds up their products at once. So
    it keeps few sums, and a multiprocessor has room for many warps that wait for memory at the same time.

    With PDL (programmatic dependent launch) the next kernel may be set up while this one runs, and this one, set up
    while the kernel in front runs, reads its first weights, which that one does not write, before it waits for it.
    """
    if PDL:
        gdc_launch_dependents()
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = values + rows[:, None] * K + tl.max_contiguous(ks, _RUN)[None, :]  # [BN, BK]
    x_ptrs = x + token * K + ks  # [BK]
    w = _weight_block(w_ptrs, ks, K, EVEN_K)
    if PDL:
        gdc_wait()
    acc = _block_product(w, x_ptrs, ks, K, BLOCK_N, BLOCK_K, EVEN_K, DOT)
    for k in range(BLOCK_K, K, BLOCK_K):
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        w = _weight_block(w_ptrs, ks, K - k, EVEN_K)
        acc += _block_product(w, x_ptrs, ks, K - k, BLOCK_N, BLOCK_K, EVEN_K, DOT)
    return tl.sum(acc, axis=1)


@triton.jit
def _weight_block(w_ptrs, ks, left, EVEN_K: tl.constexpr):
    """[BN, BK] weights, of which `left` columns are there."""
    if EVEN_K:
        w = tl.load(w_ptrs, eviction_policy="evict_first")
    else:
        w = tl.load(w_ptrs, mask=ks[None, :] < left, other=0, eviction_policy="evict_first")
    return w


@triton.jit
def _block_product(
    w,
    x_ptrs,
    ks,
    left,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """[BN, BK / _RUN] sums of _RUN neighbouring products each."""
    xv = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=ks < left, other=0.0)
    products = widened_to_fp32(w, DOT) * xv.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // _RUN, _RUN]), axis=2)


@triton.jit
def widened_to_fp32(w, DOT: tl.constexpr):
    """INT8 values in fp32, exactly; beside 16-bit activations without the card's conversion, which is slow."""
    if DOT == tl.float32:  # noqa: SIM300
        wide = w.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(FOUR_TO_FP32, "=f,=f,=f,=f,r", [w], dtype=tl.float32, is_pure=True, pack=4)
    return wide


@triton.jit
def one_token_kernel(
    x,
    values,
    scale,
    bias,
    out,
    N,
    K,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of the N outputs, M): one token and BLOCK_N weight rows per program."""
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if FUSED else BLOCK_N
    token = tl.program_id(1).to(tl.int64)
    rows = weight_rows(tl.program_id(0), N, BLOCK_N, FUSED)
    acc = vector_product(x, values, rows, token, K, BLOCK_N, BLOCK_K, EVEN_K, DOT, PDL)
    acc *= tl.load(scale + rows).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + rows).to(tl.float32)
    if FUSED:
        gate, up = tl.split(tl.reshape(acc, [OUTPUTS, 2]))
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = n < N
    ptrs = out + token * N + n
    result = silu_times(gate, up) if FUSED else acc
    tl.store(ptrs, result.to(out.dtype.element_ty), mask=mask)
