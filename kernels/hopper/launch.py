"""Launches the Hopper kernel: descriptors for TMA, the grid, and memory for tiles that programs share."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.runtime import driver

from rowint8.kernels.driver import MapShape, TensorMap
from rowint8.kernels.hopper.kernel import Config, hopper_kernel
from rowint8.kernels.hopper.stream_k import FLAG
from rowint8.kernels.launch import launch, traits
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.hopper_cost import hopper_schedule
from rowint8.kernels.tiles.types import CONSUMER_ROWS, HopperTile

_GLUON_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}
_DESCRIPTORS = 4096
"""How many are kept for either operand: layers times tiles, as activations mostly return to the same addresses."""


def hopper_product(
    tokens: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    tile: HopperTile,
    fused: bool = False,
    token_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """linear, or swiglu where `fused`, of contiguous [M, K] activations; operands `aligned`, M, N and K at least 1, for
    SwiGLU N a multiple of 16.

    Arguments as in `ops.linear`, or for INT8 tokens, which have a scale and take a tile of their own, as in
    `ops.linear_int8`; compute capability 9.0.
    """
    (M, K), N = tokens.shape, values.shape[0]
    out = torch.empty(M, N // 2 if fused else N, dtype=dtype or tokens.dtype, device=tokens.device)
    programs, waves = hopper_schedule(tile, M, N, K, card_of(tokens.device).hopper_processors)
    parts = flags = None
    if tile.shared:
        parts = torch.empty(programs, tile.rows * tile.width, dtype=torch.float32, device=tokens.device)
        flags = _flags(tokens.device, driver.active.get_current_stream(tokens.device.index))  # type: ignore[attr-defined]
    variant = "hopper", fused, tile, N, K, out.dtype, traits(tokens, scale, bias)
    weight = _weight_map(values.data_ptr(), N // 2 if fused else N, K, tile.block_k, fused, N)
    x = _token_map(tokens.data_ptr(), M, K, tokens.dtype, tile.block_m, tile.block_k)
    x_tail = _token_map(tokens.data_ptr(), M, K, tokens.dtype, tile.tail or tile.block_m, tile.block_k)
    arguments = weight, x, x_tail, token_scale, scale, bias, out, parts, flags, None, None, M, N, K, 0, waves
    launch(hopper_kernel, variant, (programs, 1, 1), arguments, _constants(tile, fused, bias is not None), _OPTIONS)
    return out


def hopper_grouped(
    tokens: Tensor,
    token_scale: Tensor | None,
    values: Tensor,
    scale: Tensor,
    table: Tensor,
    block_count: Tensor,
    tile: HopperTile,
    out: Tensor,
    fused: bool,
) -> None:
    """linear, or swiglu where `fused`, of tokens sorted by expert, into out [P, N] (or [P, N / 2]).

    Args:
        tokens: contiguous [P, K], 16-bit or, where the tile is for them, INT8.
        token_scale: fp32 [P], by which the result of each token is multiplied; None for 1.
        values: int8 [experts, N, K], contiguous; scale: fp16 [experts, N].
        table: int32 [3, most_blocks], block_count: int32, as in `experts.routing.Routing`, for blocks of the tile's
            width.
    """
    (P, K), (E, N, _) = tokens.shape, values.shape
    most_blocks = table.shape[1]
    variant = "hopper_grouped", fused, tile, E, N, K, traits(tokens, token_scale, scale, out)
    weight = _weight_map(values.data_ptr(), E * N - N // 2 if fused else E * N, K, tile.block_k, fused, N)
    x = _token_map(tokens.data_ptr(), P, K, tokens.dtype, tile.block_m, tile.block_k)
    x_tail = _token_map(tokens.data_ptr(), P, K, tokens.dtype, tile.tail or tile.block_m, tile.block_k)
    given = weight, x, x_tail, token_scale, scale, None, out, None, None, table, block_count, P, N, K, most_blocks, 0
    programs = min(card_of(tokens.device).hopper_processors, most_blocks * -(-N // tile.rows))
    launch(hopper_kernel, variant, (programs, 1, 1), given, _constants(tile, fused, False, True), _OPTIONS)


_OPTIONS = dict(num_warps=4, launch_pdl=True)


@cache
def _constants(tile: HopperTile, fused: bool, has_bias: bool, grouped: bool = False) -> dict[str, Config]:
    shape = tile.across, tile.deep, CONSUMER_ROWS, tile.block_m, tile.tail, tile.block_k, tile.stages
    return {"config": Config(fused, has_bias, *shape, tile.shared, tile.group, tile.itemsize, grouped)}


_STREAMS = 64
_FLAGS = 4
"""A program has up to four consumers, each with a flag."""
_next_place: defaultdict[torch.device, Iterator[int]] = defaultdict(count)


@cache
def _flags(device: torch.device, stream: int) -> Tensor:
    """Zeros for the kernels of one stream, which follow one another.

    As with cuBLAS's workspace, graphs that were captured in one stream must not be replayed at the same time.
    """
    place = next(_next_place[device])
    return _flags_of_streams(device, place // _STREAMS).narrow(0, place % _STREAMS, 1)


@cache
def _flags_of_streams(device: torch.device, block: int) -> Tensor:
    """Made for many streams at once, as a stream in which a graph is captured could not zero them now; and in another
    thread, as this one may allocate from a pool whose memory an engine gives back while it sleeps."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "rowint8 makes its flags at the first product, not in a CUDA graph's capture: call one before"
        )
    shape = _STREAMS, card_of(device).hopper_processors * _FLAGS * FLAG.value
    with ThreadPoolExecutor(1) as thread:
        [flags] = thread.map(partial(torch.zeros, dtype=torch.int32, device=device), [shape])
    torch.cuda.synchronize(device)
    return flags


@lru_cache(_DESCRIPTORS)
def _weight_map(address: int, rows: int, k: int, block_k: int, fused: bool, n: int) -> TensorMap:
    return TensorMap(address, _weight_shape(rows, k, block_k, fused, n))


@lru_cache(_DESCRIPTORS)
def _token_map(address: int, m: int, k: int, dtype: torch.dtype, rows: int, columns: int) -> TensorMap:
    return TensorMap(address, _shape(dtype, (m, k), (k, 1), (rows, columns)))


@cache
def _weight_shape(rows: int, k: int, block_k: int, fused: bool, n: int) -> MapShape:
    """Blocks of one consumer's rows; for SwiGLU eight gate rows and their eight up rows, n / 2 below, in turn:
    [rows / 8, 2, 8, K]. The last of `rows` is the last gate row."""
    if not fused:
        return _shape(torch.int8, (rows, k), (k, 1), (CONSUMER_ROWS, block_k))
    block = CONSUMER_ROWS // 16, 2, 8, block_k
    return _shape(torch.int8, (rows // 8, 2, 8, k), (8 * k, n // 2 * k, k, 1), block)


@lru_cache(_DESCRIPTORS)
def _shape(dtype: torch.dtype, shape: tuple, strides: tuple, block: tuple) -> MapShape:
    return MapShape(dtype, shape, strides, block, _layout(block, _GLUON_DTYPE[dtype]))


@cache
def _layout(block: tuple[int, ...], dtype: Any) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)  # type: ignore[operator]  # a constexpr function
