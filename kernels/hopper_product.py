"""Launches the Hopper kernel: descriptors for TMA, the grid, and the sum of the parts of a split K."""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rowint8.kernels.hopper import Config, hopper_kernel
from rowint8.kernels.launch import blocks, launch, traits
from rowint8.kernels.tiles import CONSUMER_ROWS, HopperTile, hopper_processors

_GLUON_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_DESCRIPTORS = 4096
"""How many are kept for either operand: layers times tiles, as activations mostly return to the same addresses."""


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


def hopper_product(
    tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, tile: HopperTile, fused: bool = False
) -> Tensor:
    """linear, or swiglu where `fused`, of contiguous [M, K] activations; operands `aligned`, M, N and K at least 1, for
    SwiGLU N a multiple of 16.

    Arguments as in `ops.linear`; compute capability 9.0.
    """
    (M, K), N = tokens.shape, values.shape[0]
    out = torch.empty(M, N // 2 if fused else N, dtype=tokens.dtype, device=tokens.device)
    tiles_m, tiles_n = blocks(M, tile.block_m), blocks(N, tile.rows)
    grid = min(hopper_processors(tokens.device), tiles_m * tiles_n * tile.split), 1, 1
    written = out
    if tile.split > 1:
        padded = tiles_n * tile.rows, tiles_m * tile.block_m
        written = torch.empty(tile.split, *padded, dtype=torch.float32, device=tokens.device)
    variant = "hopper", fused, tile, N, K, traits(tokens, scale, bias)
    weight = _weight_descriptor(values.data_ptr(), N, K, tile, fused)
    arguments = weight, _token_descriptor(tokens.data_ptr(), M, K, tokens.dtype, tile), scale, bias, written, M, N, K
    launch(hopper_kernel, variant, grid, arguments, _constants(tile, fused, bias is not None), _OPTIONS)
    if tile.split > 1:
        add_parts(written, scale, bias, out)
    return out


_OPTIONS = dict(num_warps=4, launch_pdl=True)


@cache
def _constants(tile: HopperTile, fused: bool, has_bias: bool) -> dict[str, Config]:
    shape = tile.across, tile.deep, CONSUMER_ROWS, tile.block_m, tile.block_k, tile.stages
    return {"config": Config(fused, has_bias, *shape, tile.split, tile.group)}


def add_parts(parts: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out[m, n] = sum over s of parts[s, n, m], scaled, plus bias. parts: fp32 [S, at least N, at least M]."""
    M, N = out.shape
    split, padded_n, padded_m = parts.shape
    constants: dict[str, Any] = dict(SPLIT=split, HAS_BIAS=bias is not None, BLOCK_M=32, BLOCK_N=32)
    variant = "add_parts", split, padded_m % 16 == 0, padded_n % 16 == 0, N, traits(scale, bias, out)
    grid = blocks(N, 32), blocks(M, 32), 1
    launch(_add_parts, variant, grid, (parts, scale, bias, out, M, N, padded_m, padded_n), constants, {})


class _Memory(NamedTuple):
    """What a descriptor wants of a tensor. It does not keep the memory: descriptors may be kept, and used again for
    whatever lies there later."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(_DESCRIPTORS)
def _weight_descriptor(address: int, n: int, k: int, tile: HopperTile, fused: bool) -> TensorDescriptor:
    """Blocks of one consumer's rows; for SwiGLU eight gate rows and their eight up rows in turn: [I / 8, 2, 8, K]."""
    memory: Any = _Memory(address, torch.int8)
    if not fused:
        block = [CONSUMER_ROWS, tile.block_k]
        return TensorDescriptor(memory, [n, k], [k, 1], block, _layout(tuple(block), gl.int8))
    block = [CONSUMER_ROWS // 16, 2, 8, tile.block_k]
    layout = _layout(tuple(block), gl.int8)
    return TensorDescriptor(memory, [n // 16, 2, 8, k], [8 * k, n // 2 * k, k, 1], block, layout)


@lru_cache(_DESCRIPTORS)
def _token_descriptor(address: int, m: int, k: int, dtype: torch.dtype, tile: HopperTile) -> TensorDescriptor:
    memory: Any = _Memory(address, dtype)
    block = [tile.block_m, tile.block_k]
    return TensorDescriptor(memory, [m, k], [k, 1], block, _layout(tuple(block), _GLUON_DTYPE[dtype]))


@cache
def _layout(block: tuple[int, ...], dtype: Any) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)  # type: ignore[operator]  # a constexpr function
