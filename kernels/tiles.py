"""Which tile a product runs with: a pure function of operator, shape and card. Nothing is timed at run time.

The tables come from a sweep on an H100 over the four linear shapes of Llama-3.1-8B. Other cards take
the same tiles, cut to their shared memory.
"""

from dataclasses import dataclass, replace
from functools import cache

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

# (up to this many tokens, tile for a wide weight, tile for a narrow one)
_LINEAR = (
    (16, TileConfig(16, 32, 256, 4, 4), TileConfig(16, 32, 256, 4, 5)),
    (32, TileConfig(32, 32, 256, 4, 3), TileConfig(32, 32, 256, 4, 4)),
    (64, TileConfig(64, 64, 128, 4, 3), TileConfig(32, 64, 256, 4, 3)),
    (128, TileConfig(128, 64, 128, 4, 3), TileConfig(64, 64, 128, 4, 4)),
    (256, TileConfig(256, 128, 64, 8, 4), TileConfig(128, 64, 128, 4, 4)),
)
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


@cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on a CUDA device; under the interpreter, an H100's."""
    if knobs.runtime.interpret:
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
