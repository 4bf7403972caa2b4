"""Tiles that `rowint8 tune` found to be the fastest on a card. `dispatch` takes them before the shipped ones.

They are in the file that ROWINT8_TILES names or else in ~/.config/rowint8/tiles.json. It holds, for each card (by the
name that torch has for it), operator and weight [N, K], which tile to take up to how many tokens; beyond the largest
number the shipped ones remain. The fields are those of `TritonTile`, `HopperTile` or `FewTokensTile`:

    {"NVIDIA L40S": {"linear": {"28672x4096": {"1": {"block_m": 1, ...}, "16": {"block_m": 16, ...}}}}}
"""

import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError

from rowint8.kernels.tiles.types import Tile

Tiles = dict[tuple[str, int, int], dict[int, Tile]]
"""Operator, N and K to the largest number of tokens to the tile."""

_Shape = Annotated[str, Field(pattern=r"^\d+x\d+$")]
_OF_A_CARD = TypeAdapter(dict[Literal["linear", "swiglu"], dict[_Shape, dict[int, Tile]]])


def tiles_file() -> Path:
    """Where this user's tiles are, whether there are any or not."""
    named = os.environ.get("ROWINT8_TILES")
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(named) if named else Path(config) / "rowint8" / "tiles.json"


@cache
def user_tiles(device: torch.device) -> Tiles:
    """This user's tiles for a device, read once; none for a CPU.

    Raises:
        ValueError: as `read_tiles`.
    """
    path = tiles_file()
    if device.type != "cuda" or not (path.exists() or "ROWINT8_TILES" in os.environ):
        return {}
    return read_tiles(path, torch.cuda.get_device_name(device))


def tile_for(by_tokens: dict[int, Tile], m: int) -> Tile | None:
    """The tile that goes up to the smallest number of tokens from m on, if there is one."""
    return by_tokens.get(min((most for most in by_tokens if most >= m), default=0))


def read_tiles(path: Path, card: str) -> Tiles:
    """The tiles in a file for a card.

    Raises:
        ValueError: the file cannot be read, or holds something else. The message names it.
    """
    tiles: Tiles = {}
    try:
        for op, shapes in _OF_A_CARD.validate_python(_read(path).get(card, {})).items():
            for shape, by_tokens in shapes.items():
                n, k = map(int, shape.split("x"))
                tiles[op, n, k] = by_tokens
                for tile in by_tokens.values():
                    if not tile.serves(op):
                        raise ValueError(_not_ours(path, f"{op} has {tile}, which no kernel takes"))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(_not_ours(path, f"{' '.join(map(str, first['loc']))}: {first['msg']}")) from error
    return tiles


def with_tiles(path: Path, card: str, tiles: Tiles) -> str:
    """What the file should hold with the tiles of a card; those of other cards and shapes stay.

    Raises:
        ValueError: the file exists and cannot be read, or holds something else. The message names it.
    """
    everything = _read(path) if path.exists() else {}
    for (op, n, k), by_tokens in tiles.items():
        shapes = everything.setdefault(card, {}).setdefault(op, {})
        shapes[f"{n}x{k}"] = {str(most): asdict(tile) for most, tile in sorted(by_tokens.items())}
    return json.dumps(everything, indent=1) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # reading a pipe may never end
            raise ValueError("it is no regular file")
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
