"""How the products of a mixture of experts are cut into programs, and which tile a call takes."""

import math
from dataclasses import replace
from functools import cache

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from rowint8.kernels.tiles.card import Card, card_of
from rowint8.kernels.tiles.pick import fit
from rowint8.kernels.tiles.types import HopperTile, TritonTile


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ExpertsTile:
    """Tiles of the two products of the experts in use. block_m = 1: each pair of a token and an expert on its own, on
    CUDA cores and without sorting; else tokens of one expert together, on tensor cores."""

    gate_up: TritonTile
    down: TritonTile
    narrow: int = Field(default=0, ge=0)
    """A block with at most so many tokens is computed this wide; 0: all are block_m wide."""

    def __post_init__(self) -> None:
        if self.gate_up.block_m != self.down.block_m:
            raise ValueError("both products must have the same block_m: they share the blocks of the sorted tokens")
        if self.gate_up.block_n < 2:
            raise ValueError("SwiGLU has its rows in pairs")
        if self.narrow and (self.narrow < 16 or self.narrow & (self.narrow - 1) or self.narrow >= self.block_m):
            raise ValueError("narrow must be a power of two from 16 on and below block_m, or 0")

    @property
    def block_m(self) -> int:
        """Tokens of a program."""
        return self.gate_up.block_m


_FEW_PAIRS = 8
_FEW = ExpertsTile(TritonTile(1, 2, 1024, 1, 1), TritonTile(1, 2, 256, 8, 1))
_PAIRS = ExpertsTile(TritonTile(1, 4, 512, 1, 1), TritonTile(1, 2, 256, 2, 1))
_SORTED = (
    (12, ExpertsTile(TritonTile(16, 64, 128, 4, 3), TritonTile(16, 128, 128, 4, 3))),
    (24, ExpertsTile(TritonTile(32, 64, 128, 4, 3), TritonTile(32, 64, 128, 4, 3), narrow=16)),
    (96, ExpertsTile(TritonTile(64, 64, 64, 4, 3), TritonTile(64, 64, 64, 4, 4), narrow=16)),
)
"""(up to this many pairs an expert, tile)"""
_HOPPER = (
    (12, HopperTile(16, 256, 2, 1)),
    (24, HopperTile(32, 256, 2, 1)),
    (48, HopperTile(64, 64, 4, 1)),
    (320, HopperTile(128, 128, 2, 1)),
    (math.inf, HopperTile(128, 64, 3, 1, 64)),
)
"""Likewise for the Hopper kernel. All come from sweeps over Qwen3-30B-A3B and Mixtral-8x7B on an H200."""
_INT8 = (
    (4, HopperTile(16, 256, 1, 2, int8=True)),
    (12, HopperTile(32, 128, 1, 2, int8=True)),
    (48, HopperTile(64, 256, 2, 1, int8=True)),
    (96, HopperTile(64, 128, 2, 1, 32, int8=True)),
    (192, HopperTile(128, 128, 2, 1, 32, int8=True)),
    (1024, HopperTile(128, 128, 3, 1, int8=True)),
    (math.inf, HopperTile(128, 128, 3, 1, 64, int8=True)),
)
_MANY = ExpertsTile(TritonTile(128, 128, 64, 8, 4), TritonTile(128, 128, 64, 8, 4), narrow=32)
_EXPERTS_A_PAIR = 2
"""Pairs are computed on their own where at least so many experts are there for each: few then share one."""


def pick_tile(
    tokens: int, topk: int, experts: int, itemsize: int, card: Card, by_tma: bool = False
) -> ExpertsTile | HopperTile:
    """The tile for this many tokens, `topk` experts a token, `experts` in all and activations of `itemsize` bytes, 1 of
    which is INT8.

    Args:
        by_tma: whether TMA can read the operands: see `hopper_serves`. INT8 tokens want it.
    """
    pairs = tokens * topk
    if itemsize > 1 and (tokens == 1 or pairs * _EXPERTS_A_PAIR <= experts):
        return _FEW if pairs <= _FEW_PAIRS else _PAIRS
    if itemsize == 1 and not (by_tma and card.hopper_processors):
        raise ValueError(
            "rowint8: experts take INT8 tokens on cards of compute capability 9.0, in 16 bits, without biases"
        )
    if by_tma and card.hopper_processors:
        mean = pairs / min(pairs, experts)
        return next(tile for most, tile in (_INT8 if itemsize == 1 else _HOPPER) if mean <= most)
    tile = next((tile for most, tile in _SORTED if pairs <= most * experts), _MANY)
    return _fit(tile, itemsize, card)


def why_not_int8(dtype: torch.dtype, hidden: int, intermediate: int, device: torch.device) -> str | None:
    """Why `ops.experts_int8` does not run there for activations of `dtype` and plain SwiGLUs of these sizes, if so."""
    if device.type != "cuda":
        return None
    if not card_of(device).hopper_processors:
        return "the kernel for experts needs compute capability 9.0"
    if dtype == torch.float32:
        return "the kernel for experts takes 16-bit activations"
    uneven = hidden % 16 or intermediate % 16
    return f"sizes of experts, {hidden} and {intermediate}, are not multiples of 16" if uneven else None


@cache
def _fit(tile: ExpertsTile, itemsize: int, card: Card) -> ExpertsTile:
    return replace(tile, gate_up=fit(tile.gate_up, itemsize, card), down=fit(tile.down, itemsize, card))
