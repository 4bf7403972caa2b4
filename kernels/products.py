"""Device code shared by the kernels: the product of a block of INT8 weight rows with a block of tokens, unscaled.

Both functions take *which* rows as a vector of indices, so the same loop serves a plain linear layer (consecutive rows)
and SwiGLU (gate rows and their up rows). Row indices must be in range: callers clamp them and mask the store.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.int8_convert import FOUR_TO_FP16, FOUR_TO_FP32

_RUN = tl.constexpr(8)
"""Neighbours in K of a 16-byte load of 16-bit activations."""


@triton.jit
def overlap_previous(values, rows, K, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):
    """Programmatic dependent launch: the next kernel may be set up while this one runs, and this one, set up while the
    kernel before it ran, waits for that kernel's memory.

    What may happen before the wait is a hint: the first BYTES of every weight row are brought into L2.
    """
    gdc_launch_dependents()
    lines = tl.minimum(tl.arange(0, BYTES // 128) * 128, K - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [values + rows[:, None] * K + lines[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    gdc_wait()


@triton.jit
def _widened(w, DOT: tl.constexpr):
    """INT8 values in DOT, exactly. To fp16 the compiler would convert one by one."""
    if DOT == tl.float16:  # noqa: SIM300
        wide = tl.inline_asm_elementwise(
            FOUR_TO_FP16,
            "=r,=r,r",
            [w],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        wide = w.to(DOT)
    return wide


@triton.jit
def dot_product(
    x,
    values,
    rows,  # [BN] int64
    tokens,  # [BM] int64
    M,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """acc[BN, BM] = values[rows] @ x[tokens]^T in fp32, on tensor cores.

    The weight is the left operand: Hopper's wgmma takes it from registers, where it has just been widened, and the
    tokens, often few, sit on wgmma's short side (multiples of 8). With few tokens a block has work for one warp only;
    SLICES of K, each of BLOCK_K / SLICES, then go to different warps, whose sums are added at the end.
    """
    if SLICES > 1:
        acc = _sliced_dot_product(x, values, rows, tokens, M, K, BLOCK_N, BLOCK_M, BLOCK_K, SLICES, EVEN_K, DOT)
    else:
        acc = _plain_dot_product(x, values, rows, tokens, M, K, BLOCK_N, BLOCK_M, BLOCK_K, EVEN_K, DOT)
    return acc


@triton.jit
def _plain_dot_product(
    x,
    values,
    rows,
    tokens,
    M,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
):
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = values + rows[:, None] * K + ks[None, :]  # [BN, BK]
    x_ptrs = x + tokens[None, :] * K + ks[:, None]  # [BK, BM]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=ks[None, :] < K - k, other=0)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, :] & (ks[:, None] < K - k), other=0.0)
        acc = tl.dot(_widened(w, DOT), xt.to(DOT), acc, input_precision="ieee")
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def _sliced_dot_product(
    x,
    values,
    rows,
    tokens,
    M,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
):
    SLICE: tl.constexpr = BLOCK_K // SLICES
    ks = tl.arange(0, SLICES)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]  # [S, BK / S]
    w_ptrs = values + rows[None, :, None] * K + ks[:, None, :]  # [S, BN, BK / S]
    x_ptrs = x + tokens[None, None, :] * K + ks[:, :, None]  # [S, BK / S, BM]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=ks[:, None, :] < K - k, other=0)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, None, :] & (ks[:, :, None] < K - k), other=0.0)
        acc = tl.dot(_widened(w, DOT), xt.to(DOT), acc, input_precision="ieee")
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return tl.sum(acc, axis=0)


@triton.jit
def vector_product(
    x,
    values,
    rows,  # [BN] int64
    token,  # int64 scalar
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """acc[BN] = values[rows] @ x[token] in fp32, on CUDA cores: for one token tensor cores have nothing to win.

    A thread loads _RUN neighbours of a row, as many as of the token in one load, and adds up their products at once. So
    it keeps few sums, and a multiprocessor has room for many warps that wait for memory at the same time.
    """
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = values + rows[:, None] * K + tl.max_contiguous(ks, _RUN)[None, :]  # [BN, BK]
    x_ptrs = x + token * K + ks  # [BK]
    acc = tl.zeros([BLOCK_N, BLOCK_K // _RUN], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs, eviction_policy="evict_first")
            xv = tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=ks[None, :] < K - k, other=0, eviction_policy="evict_first")
            xv = tl.load(x_ptrs, mask=ks < K - k, other=0.0)
        products = _widened_to_fp32(w, DOT) * xv.to(tl.float32)[None, :]
        acc += tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // _RUN, _RUN]), axis=2)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return tl.sum(acc, axis=1)


@triton.jit
def _widened_to_fp32(w, DOT: tl.constexpr):
    """INT8 values in fp32, exactly; beside 16-bit activations without the card's conversion, which is slow."""
    if DOT == tl.float32:  # noqa: SIM300
        wide = w.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(FOUR_TO_FP32, "=f,=f,=f,=f,r", [w], dtype=tl.float32, is_pure=True, pack=4)
    return wide
