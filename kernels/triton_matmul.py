"""The INT8 product in Triton, for every card, number of tokens and dtype: device code and launcher.

There is a kernel for one token, on CUDA cores (`one_token`), and one for many, on tensor cores. Where FUSED they
compute SwiGLU: out[M, N] = silu(x @ gate^T) * (x @ up^T) over a [2N, K] weight, gate rows over up rows. A program's
weight block then holds BLOCK_N / 2 gate rows and the same up rows, alternating, so the loop over K is the one of the
linear layer and the pair meets in the epilogue: the [M, 2N] intermediate is never written.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.int8_convert import FOUR_TO_FP16
from rowint8.kernels.launch import blocks, dependent_launch, launch, traits
from rowint8.kernels.one_token import one_token_kernel
from rowint8.kernels.shared_device_code import PREFETCH, silu_times, weight_rows
from rowint8.kernels.tiles.types import TritonTile

_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}
"""What the operands of a product are widened to: the activations' dtype, as INT8 values are exact in all of them."""


@triton.jit
def _overlap_previous(values, rows, K, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):
    """Programmatic dependent launch: the next kernel may be set up while this one runs, and this one, set up while the
    kernel before it ran, waits for that kernel's memory.

    What may happen before the wait is a hint: the first BYTES of every weight row are brought into L2.
    """
    gdc_launch_dependents()
    lines = tl.minimum(tl.arange(0, BYTES // 128) * 128, K - 1)
    addresses = values + rows[:, None] * K + lines[None, :]
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)
    gdc_wait()


@triton.jit
def _widened(w, DOT: tl.constexpr):
    """INT8 values in DOT, exactly. To fp16 the compiler would convert one by one."""
    if DOT == tl.float16:  # noqa: SIM300
        wide = tl.inline_asm_elementwise(FOUR_TO_FP16, "=r,=r,r", [w], dtype=tl.float16, is_pure=True, pack=4)
    else:
        wide = w.to(DOT)
    return wide


@triton.jit
def plain_dot_product(
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
    """acc[BN, BM] = values[rows] @ x[tokens]^T on tensor cores, for int64 rows [BN] and tokens [BM]; in fp32, or, with
    INT8 tokens, in int32.

    The weight is the left operand: Hopper's wgmma takes it from registers, where it has just been widened, and the
    tokens, often few, sit on wgmma's short side (multiples of 8).
    """
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = values + rows[:, None] * K + ks[None, :]  # [BN, BK]
    x_ptrs = x + tokens[None, :] * K + ks[:, None]  # [BK, BM]
    SUM: tl.constexpr = tl.int32 if DOT == tl.int8 else tl.float32  # type: ignore  # noqa: SIM300
    acc = tl.zeros([BLOCK_N, BLOCK_M], SUM)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=ks[None, :] < K - k, other=0)
            xt = tl.load(x_ptrs, mask=(tokens < M)[None, :] & (ks[:, None] < K - k), other=0.0)
        acc = tl.dot(_widened(w, DOT), xt.to(DOT), acc, input_precision="ieee", out_dtype=SUM)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def sliced_dot_product(
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
    """The same for few tokens, where a block has work for one warp only: SLICES of K, each of BLOCK_K / SLICES, go to
    different warps, whose sums are added at the end."""
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
def grid_position(tiles_m, tiles_n, GROUP: tl.constexpr):
    """(pid_m, pid_n) of this program: GROUP row blocks of the weight at a time, all token blocks over them.

    Programs that run together then share their weight rows and their tokens in L2.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_m)
    first_n = group * GROUP
    width = tl.minimum(tiles_n - first_n, GROUP)
    within = pid - group * GROUP * tiles_m
    return within // width, first_n + within % width


@triton.jit(do_not_specialize=["M"])  # one compilation serves every number of tokens
def many_tokens_kernel(
    x,
    values,
    scale,
    bias,
    token_scale,
    out,
    M,
    N,
    K,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (blocks of the M tokens times blocks of the N outputs,): one tile of out^T per program.

    INT8 tokens have a `token_scale`. Their sums are whole numbers, of which neither the tile nor the order of K changes
    a bit.
    """
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if FUSED else BLOCK_N
    pid_m, pid_n = grid_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, OUTPUTS), GROUP)
    tokens = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = weight_rows(pid_n, N, BLOCK_N, FUSED)
    if PDL:
        _overlap_previous(values, rows, K, BLOCK_N, 2 * BLOCK_K)
    if SLICES > 1:
        acc = sliced_dot_product(x, values, rows, tokens, M, K, BLOCK_N, BLOCK_M, BLOCK_K, SLICES, EVEN_K, DOT)
    else:
        acc = plain_dot_product(x, values, rows, tokens, M, K, BLOCK_N, BLOCK_M, BLOCK_K, EVEN_K, DOT)
    acc = acc.to(tl.float32) * tl.load(scale + rows).to(tl.float32)[:, None]
    if token_scale is not None:
        of_token = tl.load(token_scale + tokens, mask=tokens < M, other=0.0)[None, :]
        if HAS_BIAS:
            acc = tl.fma(acc, of_token, tl.load(bias + rows).to(tl.float32)[:, None])
        else:
            acc *= of_token
    elif HAS_BIAS:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    if FUSED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [OUTPUTS, 2, BLOCK_M]), [0, 2, 1]))
    n = pid_n * OUTPUTS + tl.arange(0, OUTPUTS)
    ptrs = out + tokens[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (tokens < M)[None, :]
    result = silu_times(gate, up) if FUSED else acc
    tl.store(ptrs, result.to(out.dtype.element_ty), mask=mask)


def triton_product(
    tokens: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    tile: TritonTile,
    fused: bool = False,
    token_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """linear, or swiglu where `fused`, of contiguous [M, K] activations; M and N are at least 1.

    Arguments as in `ops.linear`, or for INT8 tokens, which have a scale, as in `ops.linear_int8`.
    """
    (M, K), N = tokens.shape, values.shape[0] // (1 + fused)
    out = torch.empty(M, N, dtype=dtype or tokens.dtype, device=tokens.device)
    variant = "triton", fused, tile, N, K, out.dtype, traits(tokens, values, scale, bias)
    constants, options = _constants(tile, K, tokens.dtype, tokens.device, bias is not None, fused)
    if tile.block_m == 1:
        kernel, arguments = one_token_kernel, (tokens, values, scale, bias, out, N, K)
    else:
        kernel, arguments = many_tokens_kernel, (tokens, values, scale, bias, token_scale, out, M, N, K)
    launch(kernel, variant, grid(tile, M, N, fused), arguments, constants, options)
    return out


def grid(tile: TritonTile, m: int, n: int, fused: bool) -> tuple[int, int, int]:
    """Programs for m tokens with n outputs each. Only the first axis of a grid takes more than 65,535."""
    across = blocks(n, tile.block_n // (1 + fused))
    return (across, m, 1) if tile.block_m == 1 else (blocks(m, tile.block_m) * across, 1, 1)


@cache
def _constants(
    tile: TritonTile, k: int, dtype: torch.dtype, device: torch.device, has_bias: bool, fused: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's parameters behind its arguments, in order, and options for compiling it."""
    pdl = tile.overlaps and dependent_launch(device)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl)
    # The interpreter's dot of bf16 operands is silently wrong: there both operands are widened to fp32.
    dot = tl.float32 if knobs.runtime.interpret and dtype.is_floating_point else _TRITON_DTYPE[dtype]
    constants = dict(FUSED=fused, HAS_BIAS=has_bias, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    constants |= dict(EVEN_K=k % tile.block_k == 0, DOT=dot, PDL=pdl)
    if tile.block_m > 1:
        constants |= dict(BLOCK_M=tile.block_m, SLICES=tile.slices, GROUP=tile.group)
    return constants, options
