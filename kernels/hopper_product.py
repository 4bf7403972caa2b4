"""Launches the Hopper kernel: descriptors for TMA, the grid, and the sum of the parts of a split K."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rowint8.kernels.hopper import Config, hopper_kernel
from rowint8.kernels.tiles import CONSUMER_ROWS, HopperTile, hopper_processors

_GLUON_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ALIGNMENT = 16


@triton.jit(do_not_specialize=["M"])
def _add_parts(
    parts,
    scale,
    bias,
    out,
    M,
    N,
    padded_m,
    padded_n,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N), cdiv(M, BLOCK_M)): out[M, N] from parts [SPLIT, padded_n, padded_m], in order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (n < N)[:, None] & (m < M)[None, :]
    pointers = parts + n.to(tl.int64)[:, None] * padded_m + m[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in range(SPLIT):
        acc += tl.load(pointers + split * padded_n.to(tl.int64) * padded_m, mask=mask, other=0.0)
    acc *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=mask)


def fits(tokens: Tensor, values: Tensor, fused: bool) -> bool:
    """Whether TMA can read these contiguous tensors: 16-bit activations, rows and addresses on 16 bytes."""
    aligned = all(t.data_ptr() % _ALIGNMENT == 0 for t in (tokens, values)) and values.shape[1] % _ALIGNMENT == 0
    return aligned and tokens.dtype in _GLUON_DTYPE and not (fused and values.shape[0] % 16)


def hopper_product(
    tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, tile: HopperTile, fused: bool = False
) -> Tensor:
    """linear, or swiglu where `fused`, of contiguous [M, K] activations that `fits`; M, N and K are at least 1.

    Arguments as in `ops.linear`; compute capability 9.0.
    """
    (M, K), N = tokens.shape, values.shape[0]
    out = torch.empty(M, N // 2 if fused else N, dtype=tokens.dtype, device=tokens.device)
    tiles_m, tiles_n = triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.rows)
    programs = min(hopper_processors(tokens.device), tiles_m * tiles_n * tile.split)
    launch: dict[str, Any] = dict(num_warps=4, launch_pdl=True)
    launch["config"] = Config(
        fused,
        bias is not None,
        tile.across,
        tile.deep,
        CONSUMER_ROWS,
        tile.block_m,
        tile.block_k,
        tile.stages,
        tile.split,
        tile.group,
    )
    descriptors = _weight_descriptor(values, tile, fused), _token_descriptor(tokens, tile)
    if tile.split == 1:
        hopper_kernel[(programs,)](*descriptors, scale, bias, out, M, N, K, **launch)
        return out
    padded_m, padded_n = tiles_m * tile.block_m, tiles_n * tile.rows
    parts = torch.empty(tile.split, padded_n, padded_m, dtype=torch.float32, device=tokens.device)
    hopper_kernel[(programs,)](*descriptors, scale, bias, parts, M, N, K, **launch)
    add_parts(parts, scale, bias, out)
    return out


def add_parts(parts: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out[m, n] = sum over s of parts[s, n, m], scaled, plus bias. parts: fp32 [S, at least N, at least M]."""
    M, N = out.shape
    split, padded_n, padded_m = parts.shape
    constants: dict[str, Any] = dict(SPLIT=split, HAS_BIAS=bias is not None, BLOCK_M=32, BLOCK_N=32)
    grid = (triton.cdiv(N, 32), triton.cdiv(M, 32))
    _add_parts[grid](parts, scale, bias, out, M, N, padded_m, padded_n, **constants)


def _weight_descriptor(values: Tensor, tile: HopperTile, fused: bool) -> TensorDescriptor:
    """Blocks of one consumer's rows; for SwiGLU eight gate rows and their eight up rows in turn: [I / 8, 2, 8, K]."""
    if not fused:
        block = [CONSUMER_ROWS, tile.block_k]
        return TensorDescriptor.from_tensor(values, block, _layout(tuple(block), gl.int8))
    N, K = values.shape
    block = [CONSUMER_ROWS // 16, 2, 8, tile.block_k]
    layout = _layout(tuple(block), gl.int8)
    return TensorDescriptor(values, [N // 16, 2, 8, K], [8 * K, N // 2 * K, K, 1], block, layout)


def _token_descriptor(tokens: Tensor, tile: HopperTile) -> TensorDescriptor:
    block = [tile.block_m, tile.block_k]
    layout = _layout(tuple(block), _GLUON_DTYPE[tokens.dtype])
    return TensorDescriptor.from_tensor(tokens, block, layout)


@cache
def _layout(block: tuple[int, ...], dtype: Any) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)  # type: ignore[operator]  # a constexpr function
