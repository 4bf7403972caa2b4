"""Device code shared by the kernels: the product of a block of INT8 weight rows with a block of tokens, unscaled.

Both functions take *which* rows as a vector of indices, so the same loop serves a plain linear layer (consecutive rows)
and SwiGLU (gate rows and their up rows). Row indices must be in range: callers clamp them and mask the store.
"""

import triton
import triton.language as tl


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
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """acc[BN, BM] = values[rows] @ x[tokens]^T in fp32, on tensor cores.

    The weight is the left operand: Hopper's wgmma takes it from registers, where it has just been widened, and the
    tokens, often few, sit on wgmma's short side (multiples of 8).
    """
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
        acc = tl.dot(w.to(DOT), xt.to(DOT), acc, input_precision="ieee")
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


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
):
    """acc[BN] = values[rows] @ x[token] in fp32, on CUDA cores: for one token tensor cores have nothing to win."""
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = values + rows[:, None] * K + ks[None, :]  # [BN, BK]
    x_ptrs = x + token * K + ks  # [BK]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs)
            xv = tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=ks[None, :] < K - k, other=0)
            xv = tl.load(x_ptrs, mask=ks < K - k, other=0.0)
        acc += w.to(tl.float32) * xv.to(tl.float32)[None, :]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return tl.sum(acc, axis=1)
