"""Tiles that `rowint8 tune` found to be the fastest on a card. `tiles` takes them before the shipped ones.

They are read once, from the file that ROWINT8_TILES names or else from ~/.config/rowint8/tiles.json. It holds, for
each card (by the name that torch has for it), operator and weight [N, K], which tile to take up to how many tokens;
beyond the largest number the shipped ones remain. The fields are those of `TileConfig`, `HopperTile` or
`FewTokensTile`:

    {"NVIDIA L40S": {"linear": {"28672x4096": {"1": {"block_m": 1, ...}, "16": {"block_m": 16, ...}}}}}
"""

import json
import os
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rowint8.kernels.tiles.hopper_cost import HOPPER_TILES, HopperTile, may_be_shared
from rowint8.kernels.tiles.pick import FewTokensTile, TileConfig, pick_few_tokens_tile, pick_hopper_tile, pick_tile

Tile = TileConfig | HopperTile | FewTokensTile
Tiles = dict[tuple[str, int, int], dict[int, Tile]]
"""Operator, N and K to the largest number of tokens to the tile."""

_OPS = ("linear", "swiglu")
_used_instead: Tiles = {}


def tiles_file() -> Path:
    """Where this user's tiles are, whether there are any or not."""
    named = os.environ.get("ROWINT8_TILES")
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(named) if named else Path(config) / "rowint8" / "tiles.json"


def tuned_tile(op: str, m: int, n: int, k: int) -> Tile | None:
    """The tile of this user for the current card, if there is one for the operator, shape and number of tokens."""
    by_tokens = _by_tokens(op, n, k)
    return by_tokens.get(min((most for most in by_tokens if most >= m), default=0))


def tuned_tokens(op: str, n: int, k: int) -> list[int]:
    """The numbers of tokens up to which tiles of this user go."""
    return list(_by_tokens(op, n, k))


def use_tiles(op: str, n: int, k: int, by_tokens: dict[int, Tile]) -> None:
    """In this process, takes these tiles from now on instead of those in the file; for tuning."""
    _used_instead[op, n, k] = by_tokens
    pick_tile.cache_clear()
    pick_hopper_tile.cache_clear()
    pick_few_tokens_tile.cache_clear()


def _by_tokens(op: str, n: int, k: int) -> dict[int, Tile]:
    shape = op, n, k
    return _used_instead[shape] if shape in _used_instead else _tiles_in_file().get(shape, {})


@cache
def _tiles_in_file() -> Tiles:
    path = tiles_file()
    if not torch.cuda.is_available() or not (path.exists() or "ROWINT8_TILES" in os.environ):
        return {}
    return read_tiles(path, torch.cuda.get_device_name())


def read_tiles(path: Path, card: str) -> Tiles:
    """The tiles in a file for a card.

    Raises:
        ValueError: the file cannot be read, or holds something else. The message names it.
    """
    tiles: Tiles = {}
    everything = _read(path)
    try:
        for op, shapes in everything.get(card, {}).items():
            for shape, by_tokens in shapes.items():
                n, k = map(int, shape.split("x"))
                tiles[op, n, k] = {int(most): _tile(op, given) for most, given in by_tokens.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(_not_ours(path, error)) from error
    return tiles


def write_tiles(path: Path, card: str, tiles: Tiles) -> None:
    """Puts the tiles of a card into a file, in which those of other cards and shapes stay.

    Raises:
        ValueError: the file exists and cannot be read, or holds something else. The message names it.
    """
    everything = _read(path) if path.exists() else {}
    for (op, n, k), by_tokens in tiles.items():
        shapes = everything.setdefault(card, {}).setdefault(op, {})
        shapes[f"{n}x{k}"] = {str(most): asdict(tile) for most, tile in sorted(by_tokens.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(everything, indent=1) + "\n")
    unfinished.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        everything = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}, for tiles of `rowint8 tune`, cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(_not_ours(path, error)) from error
    if not isinstance(everything, dict):
        raise ValueError(_not_ours(path, "no object of cards"))
    return everything


def _not_ours(path: Path, why: object) -> str:
    return f"{path} holds no tiles of `rowint8 tune` ({why}); delete it, or tune again to another file"


def _tile(op: str, given: dict[str, Any]) -> Tile:
    """A tile from its fields; ValueError where no kernel takes it."""
    kind = HopperTile if "across" in given else FewTokensTile if "warps" in given else TileConfig
    accepted = [field.name for field in fields(kind)]
    if op not in _OPS or sorted(given) != sorted(accepted):
        raise ValueError(f"{op} has {sorted(given)}; accepted are {_OPS} with {accepted}")
    tile = kind(**given)
    if not _is_taken(op, tile):
        raise ValueError(f"{op} has {tile}, which no kernel takes")
    return tile


def _is_taken(op: str, tile: Tile) -> bool:
    if isinstance(tile, HopperTile):
        return _is_hopper_tile(op, tile)
    if isinstance(tile, FewTokensTile):
        whole = _are_sizes(tile.warps, tile.block_k) and tile.warps in (1, 2, 4, 8)
        return whole and tile.block_k in (128 * tile.warps, 256 * tile.warps)
    return _is_tile(op, tile)


def _is_hopper_tile(op: str, tile: HopperTile) -> bool:
    """Whether it is a shipped tile, with a group of its own."""
    shipped = replace(tile, shared=False, group=1) in {replace(each, group=1) for each in HOPPER_TILES}
    shared_or_not = type(tile.shared) is bool and (may_be_shared(op, tile) or not tile.shared)
    return shipped and shared_or_not and _are_sizes(tile.group)


def _is_tile(op: str, tile: TileConfig) -> bool:
    blocks = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.slices)
    if not _are_sizes(*blocks, tile.num_stages, tile.group) or any(size & (size - 1) for size in blocks):
        return False
    if tile.block_m == 1:
        return tile.slices == 1 and (op == "linear" or tile.block_n > 1)
    return min(tile.block_m, tile.block_n, tile.block_k // tile.slices) >= 16


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and value > 0 for value in values)
