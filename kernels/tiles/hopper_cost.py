"""How the tiles of the Hopper kernel are dealt to programs, and the time that this is estimated to take."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from rowint8.kernels.tiles.types import HOPPER_TILES, INT8_HOPPER_TILES, HopperTile


class _Cost(NamedTuple):
    """Microseconds of one wave of tiles on an H200."""

    k: float
    """Per 1024 of K."""
    wave: float


# A least-squares fit to sweeps over the linear layers of Llama-3.1-8B, Qwen2.5-7B and Llama-3.1-70B (on 8 GPUs), 10 to
# 3000 tokens, in which times near the best weigh most: for comparing tiles only.
_COSTS = {  # (block_m, block_k, across, deep, tail)
    (16, 256, 1, 2, 0): _Cost(1.66, 1.02),
    (16, 256, 2, 1, 0): _Cost(3.3, 1.5),
    (32, 256, 2, 1, 0): _Cost(3.49, 0.95),
    (32, 256, 2, 1, 16): _Cost(4.27, 0.97),
    (32, 128, 1, 2, 0): _Cost(1.86, 0.67),
    (32, 128, 1, 2, 8): _Cost(2.09, 0.83),
    (32, 128, 1, 2, 16): _Cost(2.24, 0.76),
    (64, 128, 1, 2, 0): _Cost(2.31, 0.78),
    (64, 128, 1, 2, 8): _Cost(2.66, 0.76),
    (64, 128, 1, 2, 16): _Cost(2.83, 0.81),
    (64, 128, 1, 2, 32): _Cost(3.29, 0.7),
    (64, 64, 1, 2, 64): _Cost(3.46, 1.13),
    (64, 64, 4, 1, 0): _Cost(8.86, 0.93),
    (64, 64, 4, 1, 16): _Cost(10.42, 1.41),
    (64, 64, 4, 1, 32): _Cost(10.86, 1.57),
    (128, 64, 1, 2, 16): _Cost(4.02, 1.09),
    (128, 64, 1, 2, 32): _Cost(4.65, 0.99),
    (128, 64, 1, 2, 64): _Cost(5.12, 1.1),
    (128, 128, 2, 1, 0): _Cost(6.83, 0.46),
    (128, 128, 2, 1, 16): _Cost(7.62, 1.38),
    (128, 128, 2, 1, 32): _Cost(8.46, 0.48),
    (128, 128, 2, 1, 64): _Cost(9.74, 0.4),
    (128, 64, 2, 1, 128): _Cost(11.56, 0.82),
    (128, 64, 3, 1, 16): _Cost(10.93, 1.47),
    (128, 64, 3, 1, 64): _Cost(12.19, 3.14),
    (128, 64, 4, 1, 0): _Cost(11.76, 1.54),
    (256, 64, 2, 1, 0): _Cost(11.17, 1.25),
}
_INT8_COSTS = {  # to 26 numbers of tokens from 1 to 8192
    (16, 256, 1, 2, 0): _Cost(0.42, 1.43),
    (32, 128, 1, 2, 0): _Cost(0.56, 0.93),
    (64, 128, 1, 2, 0): _Cost(1.25, 0.7),
    (64, 128, 1, 2, 16): _Cost(1.42, 1.1),
    (64, 128, 1, 2, 32): _Cost(1.74, 0.6),
    (64, 256, 2, 1, 0): _Cost(1.99, 0.63),
    (64, 128, 2, 1, 32): _Cost(2.26, 1.84),
    (128, 128, 2, 1, 0): _Cost(2.62, 1.87),
    (128, 128, 2, 1, 16): _Cost(3.25, 2.29),
    (128, 128, 2, 1, 32): _Cost(3.44, 2.25),
    (128, 128, 2, 1, 64): _Cost(3.78, 2.55),
    (128, 128, 3, 1, 0): _Cost(3.79, 2.98),
    (128, 128, 3, 1, 64): _Cost(5.6, 3.96),
    (128, 128, 2, 1, 128): _Cost(4.92, 3.81),
}
_LAUNCH_US = 1.97
_READ_MB_PER_US = 3.70
_SHARE_US = 1.77
_PART_US_PER_MB = 15.5
_SHARED_FROM = 0.98
"""Tiles are shared where that is estimated to take less than this part of the time of whole ones."""
_EVEN = 0.9
"""Part of the card from which on it is better to cut every tile alike than to use all of it."""


_ROWS_BEYOND = 16
"""From here on rows beyond m cost time: TMA fills them with zeros, slowly."""


@cache
def hopper_candidates(op: str, m: int) -> tuple[HopperTile, ...]:
    """The tiles of the Hopper kernel for m tokens, whole ones first."""
    if op.endswith("_int8"):
        return tuple(tile for tile in INT8_HOPPER_TILES if tile.block_m < max(2 * m, 17) and tile.width >= min(m, 64))
    beyond = m + _ROWS_BEYOND
    whole = [tile for tile in HOPPER_TILES if tile.block_m < beyond and tile.width >= min(m, 64)]
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
    cost = (_INT8_COSTS if tile.int8 else _COSTS)[tile.sizes]
    programs, waves = hopper_schedule(tile, m, n, k, processors)
    tiles = tile.count(m, n)
    sharing = 0.0
    if tile.shared:
        uneven = programs % tiles != 0
        behind = tiles / programs - waves
        multiplied, begun = tiles / programs, waves + 1 + uneven
        parts = max(1.0, 1 / behind - 1) + uneven  # that a program takes from others, or leaves to them
        sharing = _SHARE_US + _PART_US_PER_MB * 4e-6 * tile.rows * tile.width * parts
    else:
        multiplied = begun = -(-tiles // programs)
    computing = multiplied * cost.k * k / 1024 + begun * cost.wave
    reading = n * k / 1e6 / _READ_MB_PER_US
    us = _LAUNCH_US + (computing**4 + reading**4) ** 0.25 + sharing
    return us / _SHARED_FROM if tile.shared else us
