"""How the tiles of the Hopper kernel are dealt to programs, and the time that this is estimated to take."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from rowint8.kernels.tiles.types import HOPPER_TILES, HopperTile


class _Cost(NamedTuple):
    """Microseconds of one wave of tiles on an H200."""

    k: float
    """Per 1024 of K."""
    wave: float


# A least-squares fit to sweeps over Llama-3.1-8B's shapes, 16 to 2048 tokens: for comparing tiles only. What a part
# costs, and from where on tiles are shared, is set by hand to what makes the best choices there.
_COSTS = {  # (block_m, block_k, across, deep)
    (16, 256, 1, 2): _Cost(1.64, 1.62),
    (16, 256, 2, 1): _Cost(3.22, 2.12),
    (32, 256, 2, 1): _Cost(3.46, 1.59),
    (32, 128, 1, 2): _Cost(1.85, 1.18),
    (64, 128, 1, 2): _Cost(2.39, 1.33),
    (64, 64, 4, 1): _Cost(8.97, 0.0),
    (128, 64, 1, 2): _Cost(3.98, 0.5),
    (128, 64, 2, 2): _Cost(6.56, 1.49),
    (128, 64, 3, 1): _Cost(9.87, 0.0),
    (128, 64, 4, 1): _Cost(12.74, 0.0),
    (256, 64, 2, 1): _Cost(11.75, 0.0),
}
_LAUNCH_US = 0.85
_READ_MB_PER_US = 4.11
_SHARE_US = 1.97
_PART_US_PER_MB = 22.0
_SHARED_FROM = 0.97
"""Tiles are shared where that is estimated to take less than this part of the time of whole ones."""
_EVEN = 0.9
"""Part of the card from which on it is better to cut every tile alike than to use all of it."""


@cache
def hopper_candidates(op: str, m: int) -> tuple[HopperTile, ...]:
    """The tiles of the Hopper kernel for m tokens, whole ones first."""
    whole = [tile for tile in HOPPER_TILES if tile.block_m >= min(m, 64)]
    shared = [replace(tile, shared=True) for tile in whole if tile.can_be_shared]
    return *whole, *(tile for tile in shared if tile.serves(op))


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
    cost = _COSTS[tile.sizes]
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
