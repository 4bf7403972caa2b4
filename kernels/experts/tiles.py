"""How the products of a mixture of experts are cut into programs, and which tile a call takes."""

from dataclasses import replace

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from rowint8.kernels.tiles.card import Card
from rowint8.kernels.tiles.pick import fit
from rowint8.kernels.tiles.types import TritonTile


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


_PAIRS = ExpertsTile(TritonTile(1, 2, 1024, 1, 1), TritonTile(1, 2, 256, 4, 1))
_SORTED = (
    (10, ExpertsTile(TritonTile(16, 64, 256, 4, 3), TritonTile(16, 64, 256, 4, 3))),
    (24, ExpertsTile(TritonTile(32, 64, 256, 4, 3), TritonTile(32, 64, 256, 4, 3), narrow=16)),
    (96, ExpertsTile(TritonTile(64, 128, 128, 4, 3), TritonTile(64, 64, 128, 4, 4), narrow=16)),
)
"""(up to this many pairs an expert, tile)"""
_MANY = ExpertsTile(TritonTile(128, 128, 64, 8, 4), TritonTile(128, 128, 64, 8, 4), narrow=32)
_EXPERTS_A_PAIR = 4
"""Pairs are computed on their own where at least so many experts are there for each: few then share one."""


def pick_tile(tokens: int, topk: int, experts: int, itemsize: int, card: Card) -> ExpertsTile:
    """The tile for this many tokens, `topk` experts a token, `experts` here and activations of `itemsize` bytes."""
    pairs = tokens * topk
    if tokens == 1 or pairs * _EXPERTS_A_PAIR <= experts:
        return _PAIRS
    tile = next((tile for most, tile in _SORTED if pairs <= most * experts), _MANY)
    return replace(tile, gate_up=fit(tile.gate_up, itemsize, card), down=fit(tile.down, itemsize, card))
