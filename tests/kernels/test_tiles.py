"""The tile choice: pure, frozen, and within every card's shared memory."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rowint8.kernels import int8_linear, int8_swiglu
from rowint8.kernels.tiles.pick import TileConfig, pick_tile

SHARED_MEMORY = {"sm80": 166_912, "sm86": 101_376, "sm89": 101_376, "sm90": 232_448, "sm120": 101_376}


@given(
    op=st.sampled_from(["linear", "swiglu"]),
    m=st.integers(1, 20_000),
    n=st.integers(1, 200_000),
    k=st.integers(1, 60_000),
    itemsize=st.sampled_from([2, 4]),
    card=st.sampled_from(sorted(SHARED_MEMORY)),
)
def test_every_tile_fits_the_card(op, m, n, k, itemsize, card):
    tile = pick_tile(op, m, n, k, itemsize, SHARED_MEMORY[card])
    assert (tile.block_m == 1) == (m == 1)
    for size in (tile.block_m, tile.block_n, tile.block_k, tile.num_warps):
        assert size & (size - 1) == 0, f"{size} is not a power of two"
    if m > 1:
        assert tile.shared_memory(itemsize) <= SHARED_MEMORY[card]
        assert min(tile.block_m, tile.block_n, tile.block_k) >= 16


def test_a_smaller_card_gets_a_shorter_pipeline_of_the_same_tile():
    large = pick_tile("linear", 4096, 4096, 4096, 2, SHARED_MEMORY["sm90"])
    small = pick_tile("linear", 4096, 4096, 4096, 2, SHARED_MEMORY["sm86"])
    assert small == dataclasses.replace(large, num_stages=2)


def test_tiles_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TileConfig(16, 32, 64, 4, 3).block_m = 3


@pytest.mark.parametrize("m", [1, 16, 5000])
@pytest.mark.parametrize("module", [int8_linear, int8_swiglu])
def test_the_largest_vocabulary_fits_a_grid(monkeypatch, module, m):
    """Of a grid only the first axis takes more than 65535 blocks."""
    grids = []
    monkeypatch.setattr(module, "launch", lambda kernel, variant, grid, *rest: grids.append(grid))
    monkeypatch.setattr(module, "shared_memory_limit", lambda device: SHARED_MEMORY["sm90"])
    monkeypatch.setattr(module, "product_constants", lambda *given, **first: ({}, {}))
    product = module.int8_linear if module is int8_linear else module.int8_swiglu
    values, scale = torch.empty(256_000, 16, dtype=torch.int8), torch.empty(256_000, dtype=torch.float16)
    product(torch.empty(m, 16, dtype=torch.bfloat16), values, scale)
    assert max(grids[0][1:]) <= 65_535
    assert grids[0][0] * grids[0][1] >= 256_000 // 256
