"""The user's own tiles: what the file may hold, and that they go before the shipped ones."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.tune import write_tiles
from rowint8.kernels import dispatch
from rowint8.kernels.tiles.card import Card
from rowint8.kernels.tiles.pick import Product, pick_tile
from rowint8.kernels.tiles.types import HOPPER_TILES, FewTokensTile, TritonTile
from rowint8.kernels.tiles.user import read_tiles, tile_for, tiles_file, user_tiles

CARD = "NVIDIA Test"
ONE = TritonTile(1, 4, 512, 2, 1)
SOME = TritonTile(32, 64, 128, 8, 2, group=4, overlaps=True)
FEW = FewTokensTile(2, 512)
HOPPER = replace(HOPPER_TILES[1], shared=True, group=2)
TILES = {
    ("linear", 64, 4096): {1: ONE, 100: HOPPER, 300: SOME},
    ("swiglu", 96, 32): {7: SOME},
    ("swiglu", 64, 4096): {9: FEW},
}
HOPPER_CARD = Card(232_448, hopper_processors=132)
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A user's file, and a card that it is for. Nothing of it outlives the test."""
    path = tmp_path / "of a card" / "tiles.json"
    monkeypatch.setenv("ROWINT8_TILES", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    user_tiles.cache_clear()
    yield path
    user_tiles.cache_clear()


def picked(op, m, n=64, itemsize=2, aligned=False, card=HOPPER_CARD):
    """The tile for a [n, 4096] weight, with the user's tiles."""
    tuned = tile_for(user_tiles(DEVICE).get((op, n, 4096), {}), m)
    return pick_tile(Product(op, m, n, 4096, itemsize, aligned), card, tuned)


def shipped(op, m, n=64, itemsize=2, aligned=False):
    return pick_tile(Product(op, m, n, 4096, itemsize, aligned), HOPPER_CARD)


def test_a_file_is_read_as_it_was_written_beside_other_cards(file):
    write_tiles(file, "another card", {("linear", 64, 4096): {8: SOME}})
    write_tiles(file, CARD, TILES)
    assert read_tiles(file, CARD) == TILES
    assert read_tiles(file, "another card") == {("linear", 64, 4096): {8: SOME}}
    assert read_tiles(file, "a third card") == {}
    assert user_tiles(DEVICE) == TILES
    assert [tile_for(TILES["linear", 64, 4096], m) for m in (1, 2, 301)] == [ONE, HOPPER, None]
    assert [each.name for each in file.parent.iterdir()] == ["tiles.json"]


def test_they_go_before_the_shipped_ones(file):
    write_tiles(file, CARD, TILES)
    assert picked("linear", 1) == ONE != shipped("linear", 1)
    assert picked("linear", 101) == picked("linear", 300) == SOME
    assert picked("linear", 2) == shipped("linear", 2), "a Hopper tile is for operands that TMA can read"
    assert picked("linear", 301) == shipped("linear", 301), "beyond the largest number of tokens"
    assert picked("linear", 1, n=65) == shipped("linear", 1, n=65), "of another weight"
    assert picked("linear", 1, itemsize=4) == shipped("linear", 1, itemsize=4), "they were timed with 16 bits"
    assert [picked("linear", m, aligned=True) for m in (1, 2, 100, 300)] == [ONE, HOPPER, HOPPER, SOME]
    few = [picked("swiglu", m, aligned=True) for m in (1, 2, 8, 9)]
    assert few == [shipped("swiglu", 1), FEW, FEW, shipped("swiglu", 9)], "it is for 2 to 8 tokens"


def test_they_are_cut_to_the_card(file):
    write_tiles(file, CARD, {("linear", 64, 4096): {64: replace(SOME, num_stages=8, block_k=256)}})
    tile = picked("linear", 64, card=Card(101_376, hopper_processors=0))
    assert tile.shared_memory(2) <= 101_376
    assert (tile.block_m, tile.block_n, tile.num_warps) == (32, 64, 8)


@pytest.mark.parametrize("op", ["linear", "swiglu"])
def test_tiles_in_use_replace_those_of_the_file(monkeypatch, device, op):
    """A tile that is given runs, whatever the file says; one that cannot run is refused."""
    ran = []
    monkeypatch.setitem(dispatch._LAUNCHERS, TritonTile, lambda *given: ran.append(given[4]))
    x, scale = torch.empty(4, 32, device=device), torch.empty(64, device=device)
    values = torch.empty(64, 32, dtype=torch.int8, device=device)
    chosen = dispatch.choose(op, x, values)
    dispatch.run(op, x, values, scale)
    dispatch.run(op, x, values, scale, tile=SOME)
    assert ran == [chosen, SOME]
    assert chosen != SOME
    for tile in (FEW, HOPPER):
        with pytest.raises(ValueError, match=f"cannot run {op} of .4, 32. torch.float32 activations"):
            dispatch.run(op, x, values, scale, tile=tile)


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("ROWINT8_TILES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tiles_file() == tmp_path / "rowint8" / "tiles.json"
    monkeypatch.setenv("ROWINT8_TILES", "elsewhere.json")
    assert str(tiles_file()) == "elsewhere.json"


def test_a_file_that_is_named_must_be_there(file):
    with pytest.raises(ValueError, match=f"{file}, for tiles of `rowint8 tune`, cannot be read: No such file"):
        user_tiles(DEVICE)


def test_without_a_gpu_no_file_is_read(file):
    assert user_tiles(torch.device("cpu")) == {}


GOOD = {"linear": {"64x4096": {"16": {**asdict(SOME)}}}}


def changed(**fields):
    return {"linear": {"64x4096": {"16": {**asdict(SOME), **fields}}}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"NVIDIA Test": []}',
        json.dumps({CARD: {"linear": {"64": GOOD["linear"]["64x4096"]}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"many": asdict(SOME)}}}}),
        json.dumps({CARD: {"norm": GOOD["linear"]}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": {"block_m": 16}}}}}),
        json.dumps({CARD: changed(color=3)}),
        json.dumps({CARD: changed(block_k=100)}),
        json.dumps({CARD: changed(block_m=8)}),
        json.dumps({CARD: changed(block_n=-64)}),
        json.dumps({CARD: changed(num_stages="2")}),
        json.dumps({CARD: changed(slices=16)}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"1": {**asdict(ONE), **dict(block_n=1)}}}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": {**asdict(HOPPER), **dict(block_m=8)}}}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": {**asdict(HOPPER), **dict(shared=2)}}}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": {**asdict(HOPPER_TILES[-2]), **dict(shared=True)}}}}}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"16": asdict(HOPPER)}}}}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"8": {**asdict(FEW), **dict(warps=3)}}}}}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"8": {**asdict(FEW), **dict(block_k=64)}}}}}),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(file, content):
    file.parent.mkdir()
    file.write_text(json.dumps({CARD: GOOD}))
    assert read_tiles(file, CARD) == {("linear", 64, 4096): {16: SOME}}
    file.write_text(content)
    with pytest.raises(ValueError, match="holds no tiles of `rowint8 tune`") as refused:
        read_tiles(file, CARD)
    assert str(refused.value).startswith(f"{file} ")
    assert "\n" not in str(refused.value)


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "kept" / "tiles.json"
    link.symlink_to(target)
    for _ in range(2):  # dangling, then not
        write_tiles(link, CARD, TILES)
        assert link.is_symlink()
        assert read_tiles(target, CARD) == TILES
    os.mkfifo(tmp_path / "pipe")
    for special in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(EvalError, match=f"{special} holds .*it is no regular file"):
            write_tiles(special, CARD, TILES)
        assert not special.is_file()
