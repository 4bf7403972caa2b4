"""Tiles of the Hopper kernel: which there are, how they are dealt to programs, what they cost. `tiles` picks one."""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

CONSUMER_ROWS = 64
"""Weight rows of one consumer of the Hopper kernel: the height of a wgmma."""


@dataclass(frozen=True)
class HopperTile:
    """A variant of the Hopper kernel."""

    block_m: int
    """Tokens per program."""
    block_k: int
    across: int
    """Consumers side by side, each with CONSUMER_ROWS weight rows (for SwiGLU half of them are gate rows)."""
    deep: int
    """Consumers one behind another, each with a `block_k` of every slice of K."""
    shared: bool = False
    """Whether programs share tiles along K, so that each multiplies as much as any other: see `may_be_shared`."""
    group: int = 8
    """Row blocks of the weight that run together, for reuse in L2."""

    @property
    def rows(self) -> int:
        """Weight rows per program."""
        return self.across * CONSUMER_ROWS

    def count(self, m: int, n: int) -> int:
        """Tiles that a product of m tokens and n weight rows has."""
        return -(-m // self.block_m) * -(-n // self.rows)

    @property
    def stages(self) -> int:
        """Slices of K in flight, as many as shared memory holds."""
        handed_over = 4 * (self.deep - 1) * self.rows * self.block_m
        slice_bytes = self.deep * self.block_k * (self.rows + 2 * self.block_m)
        return min(10, (_HOPPER_RING_BYTES - handed_over) // slice_bytes)


class _Cost(NamedTuple):
    """Microseconds of one wave of tiles on an H200."""

    k: float
    """Per 1024 of K."""
    wave: float


# A least-squares fit to sweeps over Llama-3.1-8B's shapes, 16 to 2048 tokens: for comparing tiles only. What a part
# costs, and from where on tiles are shared, is set by hand to what makes the best choices there.
_HOPPER = {
    HopperTile(16, 256, across=1, deep=2): _Cost(1.64, 1.62),
    HopperTile(16, 256, across=2, deep=1): _Cost(3.22, 2.12),
    HopperTile(32, 256, across=2, deep=1): _Cost(3.46, 1.59),
    HopperTile(32, 128, across=1, deep=2): _Cost(1.85, 1.18),
    HopperTile(64, 128, across=1, deep=2): _Cost(2.39, 1.33),
    HopperTile(64, 64, across=4, deep=1): _Cost(8.97, 0.0),
    HopperTile(128, 64, across=1, deep=2): _Cost(3.98, 0.5),
    HopperTile(128, 64, across=2, deep=2): _Cost(6.56, 1.49),
    HopperTile(128, 64, across=3, deep=1): _Cost(9.87, 0.0),
    HopperTile(128, 64, across=4, deep=1): _Cost(12.74, 0.0),
    HopperTile(256, 64, across=2, deep=1): _Cost(11.75, 0.0),
}
HOPPER_TILES = tuple(_HOPPER)
_LAUNCH_US = 0.85
_READ_MB_PER_US = 4.11
_SHARE_US = 1.97
_PART_US_PER_MB = 22.0
_SHARED_FROM = 0.97
"""Tiles are shared where that is estimated to take less than this part of the time of whole ones."""
_EVEN = 0.9
"""Part of the card from which on it is better to cut every tile alike than to use all of it."""

_HOPPER_RING_BYTES = 221 * 1024
"""Shared memory for stages; the rest of a program's 227 KiB holds barriers and the epilogue's scratch."""


@cache
def hopper_candidates(op: str, m: int) -> tuple[HopperTile, ...]:
    """The tiles of the Hopper kernel for m tokens."""
    whole = [tile for tile in _HOPPER if tile.block_m >= min(m, 64)]
    return *whole, *(replace(tile, shared=True) for tile in whole if may_be_shared(op, tile))


def may_be_shared(op: str, tile: HopperTile) -> bool:
    """SwiGLU, and four consumers with 128 tokens each, have no registers left for taking the sums of others."""
    return op == "linear" and (tile.across * tile.deep < 4 or tile.block_m < 128)


class Schedule(NamedTuple):
    programs: int
    waves: int
    """Tiles that each program takes whole before all share the others; where none is shared, 0."""


@cache
def hopper_schedule(tile: HopperTile, m: int, n: int, k: int, processors: int) -> Schedule:
    """How a product's tiles are dealt to programs.

    Shared are the last one to two tiles a program. Where there are fewer tiles than programs, each is cut into equal
    parts if that occupies nearly all multiprocessors.
    """
    tiles = tile.count(m, n)
    if not tile.shared:
        return Schedule(min(processors, tiles), 0)
    if tiles >= processors:
        return Schedule(processors, tiles // processors - 1)
    even = processors // tiles * tiles
    programs = even if tiles < even and even >= _EVEN * processors else processors
    return Schedule(min(programs, tiles * -(-k // (tile.deep * tile.block_k))), 0)


def hopper_us(tile: HopperTile, m: int, n: int, k: int, processors: int) -> float:
    """Waves of tiles or reading the weight, whichever takes longer (a smooth maximum), and what sharing adds.

    With shared tiles a little more than estimated, as they must be worth their while.
    """
    cost = _HOPPER[replace(tile, shared=False)]
    programs, waves = hopper_schedule(tile, m, n, k, processors)
    tiles = tile.count(m, n)
    sharing = 0.0
    if tile.shared:
        uneven = programs % tiles != 0
        behind = tiles / programs - waves
        multiplied, begun = tiles / programs, waves + 1 + uneven
        parts = max(1.0, 1 / behind - 1) + uneven  # that a program takes from others, or leaves to them
        sharing = _SHARE_US + _PART_US_PER_MB * 4e-6 * tile.rows * tile.block_m * parts
    else:
        multiplied = begun = -(-tiles // programs)
    computing = multiplied * cost.k * k / 1024 + begun * cost.wave
    reading = n * k / 1e6 / _READ_MB_PER_US
    us = _LAUNCH_US + (computing**4 + reading**4) ** 0.25 + sharing
    return us / _SHARED_FROM if tile.shared else us
