"""The product of INT8 tokens and INT8 weights in Triton, for every card: device code and launcher.

Sums are whole numbers, so neither the tile nor the order of K changes a bit of them. Where FUSED, it is SwiGLU, and a
program's weight block holds gate and up rows in turn, as in `triton_matmul`.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.launch import dependent_launch, launch, traits
from rowint8.kernels.shared_device_code import silu_times
from rowint8.kernels.tiles.types import TritonTile
from rowint8.kernels.triton_matmul import grid, grid_position, weight_rows


@triton.jit(do_not_specialize=["M"])  # one compilation serves every number of tokens
def int8_kernel(
    x,
    token_scale,
    values,
    scale,
    bias,
    out,
    M,
    N,
    K,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (blocks of the M tokens times blocks of the N outputs,): one tile of out^T per program."""
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if FUSED else BLOCK_N
    pid_m, pid_n = grid_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, OUTPUTS), GROUP)
    tokens = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = weight_rows(pid_n, N, BLOCK_N, FUSED)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = values + rows[:, None] * K + ks[None, :]
    x_ptrs = x + tokens[None, :] * K + ks[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, :], other=0)
        else:
            w = tl.load(w_ptrs, mask=ks[None, :] < K - k, other=0)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, :] & (ks[:, None] < K - k), other=0)
        acc = tl.dot(w, xt, acc, out_dtype=tl.int32)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    row_scale = tl.load(scale + rows).to(tl.float32)
    of_token = tl.load(token_scale + tokens, mask=tokens < M, other=0.0)
    scaled = acc.to(tl.float32) * row_scale[:, None]
    if HAS_BIAS:
        result = tl.fma(scaled, of_token[None, :], tl.load(bias + rows).to(tl.float32)[:, None])
    else:
        result = scaled * of_token[None, :]
    if FUSED:
        gate, up = tl.split(tl.permute(tl.reshape(result, [OUTPUTS, 2, BLOCK_M]), [0, 2, 1]))
        result = silu_times(gate, up)
    n = pid_n * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = (n < N)[:, None] & (tokens < M)[None, :]
    tl.store(out + tokens[None, :] * N + n[:, None], result.to(out.dtype.element_ty), mask=mask)


def int8_triton_product(
    tokens: Tensor,
    token_scale: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: TritonTile,
    fused: bool = False,
) -> Tensor:
    """linear_int8, or swiglu_int8 where `fused`, of contiguous [M, K] tokens; M and N are at least 1.

    Arguments as in `ops.linear_int8`.
    """
    (M, K), N = tokens.shape, values.shape[0] // (1 + fused)
    out = torch.empty(M, N, dtype=dtype, device=tokens.device)
    variant = "int8_triton", fused, tile, N, K, dtype, traits(tokens, values, scale, bias)
    arguments = tokens, token_scale, values, scale, bias, out, M, N, K
    constants = _constants(tile, K, tokens.device, bias is not None, fused)
    launch(int8_kernel, variant, grid(tile, M, N, fused), arguments, *constants)
    return out


@cache
def _constants(
    tile: TritonTile, k: int, device: torch.device, has_bias: bool, fused: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's parameters behind its arguments, in order, and options for compiling it."""
    pdl = dependent_launch(device)
    constants = dict(FUSED=fused, HAS_BIAS=has_bias, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    constants |= dict(EVEN_K=k % tile.block_k == 0, PDL=pdl, BLOCK_M=tile.block_m, GROUP=tile.group)
    return constants, dict(num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl)
