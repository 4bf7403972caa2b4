"""Which tile a product runs with: a pure function of operator, shape and card. Nothing is timed at run time.

The tables come from sweeps on an H100 over the four linear shapes of Llama-3.1-8B. Other cards take the same tiles, cut
to their shared memory; those that are not Hopper never take a `HopperTile`.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from triton import knobs


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

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the pipeline of the tensor-core kernel holds for activations of `itemsize` bytes."""
        return self.num_stages * self.block_k * (self.block_n + self.block_m * itemsize)


WIDE_N = 16384
"""From this many rows on, one wave of large tiles fills the card; below it, smaller tiles do better."""

_ONE_TOKEN = {"long": TileConfig(1, 2, 2048, 4, 2), "short": TileConfig(1, 2, 1024, 2, 3)}
_LONG_K = 8192
_ONE_WAVE_N = 4224
"""Up to here blocks of 32 rows run at once on 132 multiprocessors; beyond, smaller programs share one."""

# (up to this many tokens, tile for a wide weight, tile for a narrow one)
_LINEAR = (
    (16, TileConfig(16, 32, 256, 2, 4), TileConfig(16, 32, 256, 4, 5)),
    (32, TileConfig(32, 32, 256, 4, 3), TileConfig(32, 32, 256, 4, 4)),
    (64, TileConfig(64, 64, 128, 4, 3), TileConfig(32, 64, 256, 4, 3)),
    (128, TileConfig(128, 64, 128, 4, 3), TileConfig(64, 64, 128, 4, 4)),
    (256, TileConfig(256, 128, 64, 8, 4), TileConfig(128, 64, 128, 4, 4)),
)
_FEW_TOKENS_MIDDLE_N = TileConfig(16, 32, 512, 2, 3)
_SWIGLU = (
    (16, TileConfig(16, 128, 128, 8, 3), TileConfig(16, 32, 256, 4, 5)),
    (32, TileConfig(32, 32, 128, 4, 3), TileConfig(32, 32, 256, 4, 4)),
    (64, TileConfig(64, 64, 128, 4, 2), TileConfig(32, 64, 256, 4, 3)),
    (128, TileConfig(128, 128, 128, 8, 4), TileConfig(64, 64, 128, 4, 4)),
    (256, TileConfig(256, 128, 64, 8, 4), TileConfig(128, 64, 128, 4, 4)),
)
_PREFILL = TileConfig(256, 128, 64, 8, 4)


@cache
def pick_tile(op: str, m: int, n: int, k: int, itemsize: int, shared_memory: int) -> TileConfig:
    """The tile for `op` ("linear" or "swiglu") on m tokens and an [n, k] weight.

    Args:
        itemsize: bytes of one activation.
        shared_memory: bytes that one program may use on this card; see `shared_memory_limit`.
    """
    if m == 1:
        return _ONE_TOKEN["long" if k >= _LONG_K else "short"]
    if op == "linear" and m <= 16 and _ONE_WAVE_N < n < WIDE_N:
        return _fit(_FEW_TOKENS_MIDDLE_N, itemsize, shared_memory)
    for max_m, wide, narrow in _SWIGLU if op == "swiglu" else _LINEAR:
        if m <= max_m:
            return _fit(wide if n >= WIDE_N else narrow, itemsize, shared_memory)
    return _fit(_PREFILL, itemsize, shared_memory)


def _fit(tile: TileConfig, itemsize: int, shared_memory: int) -> TileConfig:
    """Cuts the pipeline, then the block of K, until the tile fits the card."""
    while tile.shared_memory(itemsize) > shared_memory and tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    while tile.shared_memory(itemsize) > shared_memory and tile.block_k > 32:
        tile = replace(tile, block_k=tile.block_k // 2)
    return tile


@dataclass(frozen=True)
class HopperTile:
    """A variant of the Hopper kernel."""

    rows: int
    """Weight rows per consumer; a program has two consumers. For SwiGLU half of them are gate rows."""
    block_m: int
    """Tokens per program."""
    block_k: int
    split: int = 1
    """Parts that K is cut into, for weights with too few rows to fill the card."""
    group: int = 8
    """Row blocks of the weight that run together, for reuse in L2."""

    @property
    def stages(self) -> int:
        """Blocks of K in flight, as many as shared memory holds."""
        return min(10, _HOPPER_RING_BYTES // (2 * (self.rows + self.block_m) * self.block_k))


class _Cost(NamedTuple):
    """Microseconds on an H100 at K = 1024 and more: a least-squares fit to a sweep, for comparing tiles only."""

    k: float
    """Per wave of tiles and 1024 of K."""
    wave: float
    split: float
    """Once, if K is split."""
    fixed: float


_HOPPER = {
    HopperTile(64, 16, 256): _Cost(4.16, 5.09, 7.65, -3.22),
    HopperTile(64, 32, 256): _Cost(4.07, 8.19, 7.42, -5.80),
    HopperTile(64, 64, 128): _Cost(4.58, 9.18, 7.94, -4.20),
    HopperTile(128, 64, 128): _Cost(7.90, 19.55, 7.15, -8.83),
    HopperTile(64, 128, 128): _Cost(4.98, 11.80, 8.38, 0.73),
    HopperTile(64, 128, 64): _Cost(5.44, 12.33, 8.63, -1.38),
    HopperTile(128, 128, 64): _Cost(10.24, 19.17, 13.63, -4.59),
    HopperTile(64, 256, 64): _Cost(8.04, 18.58, 20.12, -7.10),
}
HOPPER_TILES = tuple(_HOPPER)
_HOPPER_RING_BYTES = 221 * 1024
"""Shared memory for stages; the rest of a program's 227 KiB holds barriers and the epilogue's scratch."""
_HOPPER_MIN_TOKENS = {"linear": 17, "swiglu": 2}
"""Below this the smaller kernels are faster."""
_SPLITS = (1, 2, 4)


@cache
def pick_hopper_tile(op: str, m: int, n: int, k: int, processors: int) -> HopperTile | None:
    """The tile with the least estimated time for 16-bit activations; None where the other kernels are faster.

    Args:
        processors: multiprocessors of the card.
    """
    if m < _HOPPER_MIN_TOKENS[op]:
        return None
    splits = _SPLITS if op == "linear" else (1,)
    candidates = [
        replace(tile, split=split)
        for tile in _HOPPER
        for split in splits
        if split * tile.block_k <= max(k, tile.block_k) and (tile.block_m <= 16) == (m <= 16)
    ]
    return min(candidates, key=lambda tile: _hopper_us(tile, m, n, k, processors), default=None)


def _hopper_us(tile: HopperTile, m: int, n: int, k: int, processors: int) -> float:
    cost = _HOPPER[replace(tile, split=1)]
    units = -(-m // tile.block_m) * -(-n // (2 * tile.rows)) * tile.split
    waves = -(-units // processors)
    per_wave = cost.k * k / tile.split / 1024 + cost.wave
    return waves * per_wave + cost.split * (tile.split > 1) + cost.fixed


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
