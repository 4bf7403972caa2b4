"""Which tile a product runs with: a pure function of operator, shape and card. Nothing is timed at run time.

The tables come from sweeps over the four linear shapes of Llama-3.1-8B, on an H100 and, for the kernels in Gluon, an
H200. Other cards take the same tiles, cut to their shared memory; those that are not Hopper never take a `HopperTile`.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from triton import knobs

from rowint8.kernels.tiles.hopper_cost import HopperTile, hopper_candidates, hopper_us


@dataclass(frozen=True)
class TileConfig:
    """A kernel variant. block_m = 1 means the one-token kernel on CUDA cores; otherwise the tensor-core kernel."""

    block_m: int
    """Tokens per program."""
    block_n: int
    """Weight rows per program (for SwiGLU: gate and up rows together)."""
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    """Row blocks of the weight that run together, for reuse in L2."""
    slices: int = 1
    """Slices of a block of K that go to different warps."""
    overlaps: bool = False
    """Whether the kernel is set up while the one in front of it still runs, where the card can do so."""

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the pipeline of the tensor-core kernel holds for activations of `itemsize` bytes."""
        return self.num_stages * self.block_k * (self.block_n + self.block_m * itemsize)


WIDE_N = 16384
"""From this many rows on, one wave of large tiles fills the card; below it, smaller tiles do better."""

_ONE_WAVE_N = 4224
"""Up to here blocks of 16 rows run at once, two on each of 132 multiprocessors."""

_LONG_K = 8192
"""From here on a narrow weight has too few rows to fill the card two by two, and rows long enough to do so singly."""

_ONE_TOKEN = TileConfig(1, 2, 1024, 1, 1, overlaps=True)
_ONE_TOKEN_MIDDLE = TileConfig(1, 2, 512, 1, 1, overlaps=True)
_ONE_TOKEN_LONG = TileConfig(1, 1, 2048, 1, 1, overlaps=True)
_FEW_TOKENS = TileConfig(16, 16, 512, 4, 5, slices=4, overlaps=True)
_FEW_TOKENS_MIDDLE = TileConfig(16, 16, 512, 4, 4, slices=4, overlaps=True)

# (up to this many tokens, tile for a wide weight, tile for a narrow one)
_LINEAR = (
    (16, TileConfig(16, 32, 256, 2, 4), _FEW_TOKENS),
    (32, TileConfig(32, 32, 256, 4, 3), TileConfig(32, 32, 256, 4, 4)),
    (64, TileConfig(64, 64, 128, 4, 3), TileConfig(32, 64, 256, 4, 3)),
    (128, TileConfig(128, 64, 128, 4, 3), TileConfig(64, 64, 128, 4, 4)),
    (256, TileConfig(256, 128, 64, 8, 4), TileConfig(128, 64, 128, 4, 4)),
)
_SWIGLU = (
    (16, TileConfig(16, 128, 128, 8, 3), _FEW_TOKENS),
    (32, TileConfig(32, 32, 128, 4, 3), TileConfig(32, 32, 256, 4, 4)),
    (64, TileConfig(64, 64, 128, 4, 2), TileConfig(32, 64, 256, 4, 3)),
    (128, TileConfig(128, 128, 128, 8, 4), TileConfig(64, 64, 128, 4, 4)),
    (256, TileConfig(256, 128, 64, 8, 4), TileConfig(128, 64, 128, 4, 4)),
)
_PREFILL = TileConfig(256, 128, 64, 8, 4)


@dataclass(frozen=True)
class FewTokensTile:
    """A variant of the kernel for 2 to 8 tokens, which has 16 weight rows a program."""

    warps: int
    block_k: int
    """K of all warps at a time."""


MOST_FEW_TOKENS = 8
_FEW_WIDE = FewTokensTile(4, 1024)
_FEW_MIDDLE = FewTokensTile(8, 1024)
_FEW_NARROW = FewTokensTile(8, 2048)


@cache
def pick_few_tokens_tile(op: str, m: int, n: int, k: int) -> FewTokensTile | None:
    """The tile of the kernel for few 16-bit tokens, on any card; None where the others are faster."""
    if not 1 < m <= MOST_FEW_TOKENS:
        return None
    tuned = _tuned(op, m, n, k)
    if tuned is not None:
        return tuned if isinstance(tuned, FewTokensTile) else None
    return _FEW_NARROW if n <= _ONE_WAVE_N else _FEW_WIDE if n >= WIDE_N else _FEW_MIDDLE


@cache
def pick_tile(op: str, m: int, n: int, k: int, itemsize: int, shared_memory: int) -> TileConfig:
    """The tile for `op` ("linear" or "swiglu") on m tokens and an [n, k] weight.

    Args:
        itemsize: bytes of one activation.
        shared_memory: bytes that one program may use on this card; see `shared_memory_limit`.
    """
    tuned = _tuned(op, m, n, k)
    if isinstance(tuned, TileConfig) and itemsize == 2:
        return _fit(tuned, itemsize, shared_memory)
    middle = _ONE_WAVE_N < n < WIDE_N
    if m == 1 and op == "linear" and k >= _LONG_K and n < WIDE_N:
        return _ONE_TOKEN_LONG
    if m == 1:
        return _ONE_TOKEN_MIDDLE if middle else _ONE_TOKEN
    if m <= 16 and middle:
        return _fit(_FEW_TOKENS_MIDDLE, itemsize, shared_memory)
    for max_m, wide, narrow in _SWIGLU if op == "swiglu" else _LINEAR:
        if m <= max_m:
            return _fit(wide if n >= WIDE_N else narrow, itemsize, shared_memory)
    return _fit(_PREFILL, itemsize, shared_memory)


def _fit(tile: TileConfig, itemsize: int, shared_memory: int) -> TileConfig:
    """Cuts the pipeline, then the block of K, until the tile fits the card."""
    while tile.shared_memory(itemsize) > shared_memory and tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    while tile.shared_memory(itemsize) > shared_memory and tile.block_k > 32 * tile.slices:
        tile = replace(tile, block_k=tile.block_k // 2)
    return tile


_SMALL_N, _SMALL_K = 6336, 4096
"""A weight with at most these rows, and less than this K, is read before the Hopper kernel has started."""


@cache
def pick_hopper_tile(op: str, m: int, n: int, k: int, processors: int) -> HopperTile | None:
    """The tile with the least estimated time for 16-bit activations; None where the other kernels are faster.

    Args:
        processors: multiprocessors of the card.
    """
    tuned = _tuned(op, m, n, k)
    if tuned is not None:
        return tuned if isinstance(tuned, HopperTile) else None
    if _others_are_faster(op, m, n, k):
        return None
    return min(hopper_candidates(op, m), key=lambda tile: hopper_us(tile, m, n, k, processors))


def _others_are_faster(op: str, m: int, n: int, k: int) -> bool:
    """Whether the kernels without TMA are faster than the Hopper kernel."""
    return m == 1 or (m <= 16 and op == "linear" and n <= _SMALL_N and k < _SMALL_K)


def _tuned(op: str, m: int, n: int, k: int) -> Any:
    """The tile that `rowint8 tune` found on this card for 16-bit activations, or None."""
    from rowint8.kernels.tiles.user import tuned_tile  # imports the tiles of this module

    return tuned_tile(op, m, n, k)


@cache
def hopper_processors(device: torch.device) -> int:
    """Multiprocessors of a card that runs the Hopper kernel (compute capability 9.0); 0 for any other device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on a CUDA device; under the interpreter, an H100's."""
    if knobs.runtime.interpret:
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
