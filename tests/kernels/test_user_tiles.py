"""The user's own tiles: what the file may hold, and that they go before the shipped ones."""

import json
from dataclasses import replace

import pytest
import torch

from rowint8.kernels.tiles import user as tuned
from rowint8.kernels.tiles.hopper_cost import HOPPER_TILES
from rowint8.kernels.tiles.pick import FewTokensTile, TileConfig, pick_few_tokens_tile, pick_hopper_tile, pick_tile
from rowint8.kernels.tiles.user import read_tiles, tiles_file, tuned_tile, use_tiles, write_tiles

CARD = "NVIDIA Test"
ONE = TileConfig(1, 4, 512, 2, 1)
SOME = TileConfig(32, 64, 128, 8, 2, group=4, overlaps=True)
FEW = FewTokensTile(2, 512)
HOPPER = replace(HOPPER_TILES[1], shared=True, group=2)
TILES = {
    ("linear", 64, 4096): {1: ONE, 100: HOPPER, 300: SOME},
    ("swiglu", 96, 32): {7: SOME},
    ("swiglu", 64, 4096): {9: FEW},
}
SHARED_MEMORY = 232_448


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A user's file, and a card that it is for. Nothing of it outlives the test."""
    path = tmp_path / "of a card" / "tiles.json"
    monkeypatch.setenv("ROWINT8_TILES", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)
    monkeypatch.setattr(tuned, "_used_instead", {})
    caches = tuned._tiles_in_file, pick_tile, pick_hopper_tile, pick_few_tokens_tile
    for cached in caches:
        cached.cache_clear()
    yield path
    for cached in caches:
        cached.cache_clear()


def linear(m, itemsize=2, n=64):
    return pick_tile("linear", m, n, 4096, itemsize, SHARED_MEMORY)


def test_a_file_is_read_as_it_was_written_beside_other_cards(file):
    write_tiles(file, "another card", {("linear", 64, 4096): {8: SOME}})
    write_tiles(file, CARD, TILES)
    assert read_tiles(file, CARD) == TILES
    assert read_tiles(file, "another card") == {("linear", 64, 4096): {8: SOME}}
    assert read_tiles(file, "a third card") == {}
    assert tuned_tile("linear", 1, 64, 4096) == ONE
    assert [each.name for each in file.parent.iterdir()] == ["tiles.json"]


def test_they_go_before_the_shipped_ones(file):
    use_tiles("linear", 64, 4096, {})
    shipped = {m: linear(m) for m in (1, 2, 100, 101, 301)}
    shipped_fp32 = linear(1, itemsize=4)
    write_tiles(file, CARD, TILES)
    use_tiles("linear", 64, 4096, read_tiles(file, CARD)["linear", 64, 4096])
    assert linear(1) == ONE != shipped[1]
    assert linear(101) == linear(300) == SOME
    assert linear(2) == shipped[2], "a Hopper tile is for the Hopper kernel alone"
    assert linear(301) == shipped[301], "beyond the largest number of tokens"
    assert linear(1, n=65) == shipped[1], "of another weight"
    assert linear(1, itemsize=4) == shipped_fp32, "they were timed with 16 bits"
    assert [pick_hopper_tile("linear", m, 64, 4096, 132) for m in (1, 2, 100, 300)] == [None, HOPPER, HOPPER, None]
    assert [pick_few_tokens_tile("swiglu", m, 64, 4096) for m in (1, 2, 8, 9)] == [None, FEW, FEW, None]
    assert pick_few_tokens_tile("linear", 2, 64, 4096) is None, "a Hopper tile goes before the shipped one"


def test_they_are_cut_to_the_card(file):
    write_tiles(file, CARD, {("linear", 64, 4096): {64: replace(SOME, num_stages=8, block_k=256)}})
    tile = pick_tile("linear", 64, 64, 4096, 2, 101_376)
    assert tile.shared_memory(2) <= 101_376
    assert (tile.block_m, tile.block_n, tile.num_warps) == (32, 64, 8)


def test_tiles_in_use_replace_those_of_the_file(file):
    write_tiles(file, CARD, TILES)
    use_tiles("linear", 64, 4096, {5: SOME})
    assert linear(4) == SOME
    use_tiles("linear", 64, 4096, {})
    assert tuned_tile("linear", 1, 64, 4096) is None
    assert tuned_tile("swiglu", 7, 96, 32) == SOME


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("ROWINT8_TILES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tiles_file() == tmp_path / "rowint8" / "tiles.json"
    monkeypatch.setenv("ROWINT8_TILES", "elsewhere.json")
    assert str(tiles_file()) == "elsewhere.json"


def test_a_file_that_is_named_must_be_there(file):
    with pytest.raises(ValueError, match=f"{file}, for tiles of `rowint8 tune`, cannot be read: No such file"):
        linear(1)


def test_without_a_gpu_no_file_is_read(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuned_tile("linear", 1, 64, 4096) is None


GOOD = {"linear": {"64x4096": {"16": {**vars(SOME)}}}}


def changed(**fields):
    return {"linear": {"64x4096": {"16": {**vars(SOME), **fields}}}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"NVIDIA Test": []}',
        json.dumps({CARD: {"linear": {"64": GOOD["linear"]["64x4096"]}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"many": vars(SOME)}}}}),
        json.dumps({CARD: {"norm": GOOD["linear"]}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": {"block_m": 16}}}}}),
        json.dumps({CARD: changed(color=3)}),
        json.dumps({CARD: changed(block_k=100)}),
        json.dumps({CARD: changed(block_m=8)}),
        json.dumps({CARD: changed(block_n=-64)}),
        json.dumps({CARD: changed(num_stages="2")}),
        json.dumps({CARD: changed(slices=16)}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"1": vars(replace(ONE, block_n=1))}}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": vars(replace(HOPPER, block_m=8))}}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": vars(replace(HOPPER, shared=2))}}}}),
        json.dumps({CARD: {"linear": {"64x4096": {"16": vars(replace(HOPPER_TILES[-2], shared=True))}}}}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"16": vars(HOPPER)}}}}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"8": vars(replace(FEW, warps=3))}}}}),
        json.dumps({CARD: {"swiglu": {"64x4096": {"8": vars(replace(FEW, block_k=64))}}}}),
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
