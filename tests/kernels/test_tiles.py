"""The tile choice: pure, frozen, and within every card's shared memory."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowint8.kernels.tiles.card import Card
from rowint8.kernels.tiles.pick import Product, pick_triton_tile
from rowint8.kernels.tiles.types import TritonTile
from rowint8.kernels.triton_matmul import grid

SHARED_MEMORY = {"sm80": 166_912, "sm86": 101_376, "sm89": 101_376, "sm90": 232_448, "sm120": 101_376}


def picked(card, op, m, n, k, itemsize=2):
    return pick_triton_tile(Product(op, m, n, k, itemsize, aligned=False), Card(SHARED_MEMORY[card], 0))


@given(
    op=st.sampled_from(["linear", "swiglu"]),
    m=st.integers(1, 20_000),
    n=st.integers(1, 200_000),
    k=st.integers(1, 60_000),
    itemsize=st.sampled_from([2, 4]),
    card=st.sampled_from(sorted(SHARED_MEMORY)),
)
def test_every_tile_fits_the_card(op, m, n, k, itemsize, card):
    tile = picked(card, op, m, n, k, itemsize)
    assert (tile.block_m == 1) == (m == 1)
    for size in (tile.block_m, tile.block_n, tile.block_k, tile.num_warps):
        assert size & (size - 1) == 0, f"{size} is not a power of two"
    if m > 1:
        assert tile.shared_memory(itemsize) <= SHARED_MEMORY[card]
        assert min(tile.block_m, tile.block_n, tile.block_k) >= 16


def test_a_smaller_card_gets_a_shorter_pipeline_of_the_same_tile():
    large = picked("sm90", "linear", 4096, 4096, 4096)
    small = picked("sm86", "linear", 4096, 4096, 4096)
    assert small == dataclasses.replace(large, num_stages=2)


def test_tiles_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TritonTile(16, 32, 64, 4, 3).block_m = 3


@pytest.mark.parametrize("m", [1, 16, 5000])
@pytest.mark.parametrize("op", ["linear", "swiglu"])
def test_the_largest_vocabulary_fits_a_grid(op, m):
    """Only the first axis of a grid takes more than 65535 blocks."""
    fused = op == "swiglu"
    across, *others = grid(picked("sm90", op, m, 256_000, 16), m, 256_000 // (1 + fused), fused)
    assert max(others) <= 65_535
    assert across * others[0] >= 256_000 // 256
