"""out[M, I] = silu(x @ gate^T) * (x @ up^T) in one Triton kernel over a [2I, K] weight (gate rows over up rows).

A program's weight block holds BLOCK_N / 2 gate rows and the same up rows, alternating, so the product loop is the plain
linear one and the pair meets in the epilogue: the [M, 2I] intermediate is never written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowint8.kernels.gluon_products import gluon_product, gluon_tile
from rowint8.kernels.launch import blocks, grid_position, launch, product_constants, traits
from rowint8.kernels.products import dot_product, overlap_previous, vector_product
from rowint8.kernels.tiles.pick import pick_tile, shared_memory_limit


@triton.jit
def _silu_times(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _paired_rows(pid, I, BLOCK_N: tl.constexpr):
    """Rows [BN] of the [2I, K] weight, gate and up alternating, for outputs pid * BN / 2 onward, clamped in range."""
    n = tl.arange(0, BLOCK_N)
    i = tl.minimum(pid * (BLOCK_N // 2) + n // 2, I - 1)
    return (i + (n % 2) * I).to(tl.int64)


@triton.jit
def _swiglu_one_token(
    x,
    values,
    scale,
    out,
    I,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(I, BLOCK_N / 2), M)."""
    token = tl.program_id(1).to(tl.int64)
    rows = _paired_rows(tl.program_id(0), I, BLOCK_N)
    if PDL:
        overlap_previous(values, rows, K, BLOCK_N, BLOCK_K)
    acc = vector_product(x, values, rows, token, K, BLOCK_N, BLOCK_K, EVEN_K, DOT)
    acc *= tl.load(scale + rows).to(tl.float32)
    gate, up = tl.split(tl.reshape(acc, [BLOCK_N // 2, 2]))
    i = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    tl.store(out + token * I + i, _silu_times(gate, up).to(out.dtype.element_ty), mask=i < I)


@triton.jit(do_not_specialize=["M"])  # one compilation serves every number of tokens
def _swiglu_many_tokens(
    x,
    values,
    scale,
    out,
    M,
    I,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M) * cdiv(I, BLOCK_N / 2),): one [BLOCK_N / 2, BLOCK_M] tile of out^T per program."""
    pid_m, pid_n = grid_position(tl.cdiv(M, BLOCK_M), tl.cdiv(I, BLOCK_N // 2), GROUP)
    tokens = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = _paired_rows(pid_n, I, BLOCK_N)
    if PDL:
        overlap_previous(values, rows, K, BLOCK_N, 2 * BLOCK_K)
    acc = dot_product(x, values, rows, tokens, M, K, BLOCK_N, BLOCK_M, BLOCK_K, SLICES, EVEN_K, DOT)  # [BN, BM]
    acc *= tl.load(scale + rows).to(tl.float32)[:, None]
    pairs = tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, BLOCK_M]), [0, 2, 1])  # [BN / 2, BM, 2]
    gate, up = tl.split(pairs)
    i = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    ptrs = out + tokens[None, :] * I + i[:, None]
    mask = (i < I)[:, None] & (tokens < M)[None, :]
    tl.store(ptrs, _silu_times(gate, up).to(out.dtype.element_ty), mask=mask)


def int8_swiglu(tokens: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Launches the kernel for contiguous [M, K] activations; arguments as in `ops.swiglu`, already checked there."""
    N, K = values.shape
    I = N // 2
    M = tokens.shape[0]
    gluon = gluon_tile("swiglu", tokens, values)
    if gluon is not None:
        return gluon_product(gluon, tokens, values, scale, fused=True)
    out = torch.empty(M, I, dtype=tokens.dtype, device=tokens.device)
    if out.numel():
        tile = pick_tile("swiglu", M, N, K, tokens.element_size(), shared_memory_limit(tokens.device))
        constants, options = product_constants(tile, K, tokens.dtype, tokens.device)
        variant = "swiglu", tile, N, K, traits(tokens, values, scale)
        outputs = tile.block_n // 2
        if tile.block_m == 1:
            grid = (blocks(I, outputs), M, 1)
            launch(_swiglu_one_token, variant, grid, (tokens, values, scale, out, I, K), constants, options)
        else:
            grid = (blocks(M, tile.block_m) * blocks(I, outputs), 1, 1)
            launch(_swiglu_many_tokens, variant, grid, (tokens, values, scale, out, M, I, K), constants, options)
    return out
