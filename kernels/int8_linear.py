"""out[M, N] = (x[M, K] @ values[N, K]^T) * scale[N] + bias[N] in Triton: device code and launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowint8.kernels.gluon_products import gluon_product, gluon_tile
from rowint8.kernels.launch import blocks, grid_position, launch, product_constants, traits
from rowint8.kernels.products import dot_product, overlap_previous, vector_product
from rowint8.kernels.tiles.pick import pick_tile, shared_memory_limit


@triton.jit
def _linear_one_token(
    x,
    values,
    scale,
    bias,
    out,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N), M): one token and BLOCK_N outputs per program."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    if PDL:
        overlap_previous(values, rows, K, BLOCK_N, BLOCK_K)
    acc = vector_product(x, values, rows, token, K, BLOCK_N, BLOCK_K, EVEN_K, DOT)
    acc *= tl.load(scale + rows).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + rows).to(tl.float32)
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])  # one compilation serves every number of tokens
def _linear_many_tokens(
    x,
    values,
    scale,
    bias,
    out,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),): one [BLOCK_N, BLOCK_M] tile of out^T per program."""
    pid_m, pid_n = grid_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    tokens = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    if PDL:
        overlap_previous(values, rows, K, BLOCK_N, 2 * BLOCK_K)
    acc = dot_product(x, values, rows, tokens, M, K, BLOCK_N, BLOCK_M, BLOCK_K, SLICES, EVEN_K, DOT)  # [BN, BM]
    acc *= tl.load(scale + rows).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    ptrs = out + tokens[None, :] * N + n[:, None]
    tl.store(ptrs, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (tokens < M)[None, :])


def int8_linear(tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Launches the kernel for contiguous [M, K] activations; arguments as in `ops.linear`, already checked there."""
    N, K = values.shape
    M = tokens.shape[0]
    gluon = gluon_tile("linear", tokens, values)
    if gluon is not None:
        return gluon_product(gluon, tokens, values, scale, bias)
    out = torch.empty(M, N, dtype=tokens.dtype, device=tokens.device)
    if out.numel():
        tile = pick_tile("linear", M, N, K, tokens.element_size(), shared_memory_limit(tokens.device))
        constants, options = product_constants(tile, K, tokens.dtype, tokens.device, HAS_BIAS=bias is not None)
        variant = "linear", tile, N, K, traits(tokens, values, scale, bias)
        if tile.block_m == 1:
            grid = (blocks(N, tile.block_n), M, 1)
            launch(_linear_one_token, variant, grid, (tokens, values, scale, bias, out, N, K), constants, options)
        else:
            grid = (blocks(M, tile.block_m) * blocks(N, tile.block_n), 1, 1)
            launch(_linear_many_tokens, variant, grid, (tokens, values, scale, bias, out, M, N, K), constants, options)
    return out
