"""The Hopper kernel against the fp64 oracle, on a card of compute capability 9.0.

The interpreter does not run Gluon: without such a card only the choice of tiles is tested here, and
tests/kernels/test_compilation.py compiles the kernel.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rowint8.kernels import ops, reference
from rowint8.kernels.dispatch import aligned, choose
from rowint8.kernels.hopper.launch import _flags, _flags_of_streams, hopper_product
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.hopper_cost import hopper_candidates, hopper_schedule
from rowint8.kernels.tiles.pick import pick_hopper_tile
from rowint8.kernels.tiles.types import HOPPER_TILES, HopperTile, TritonTile
from tests.kernels.cases import absolute, case

pytestmark = pytest.mark.usefixtures("poison_empty")
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and card_of(torch.device("cuda")).hopper_processors), reason="needs a Hopper GPU"
)
SHARED_MEMORY = 232_448
SHAPES = [(16, 16), (336, 1040), (1296, 4112)]


def each_tile(op: str):
    """The tiles of an operator in bf16, one of them in fp16, too."""
    tiles = hopper_candidates(op, 1)
    in_fp16 = [tile for tile in tiles if replace(tile, shared=False) == HOPPER_TILES[2]]
    both = [*((tile, torch.bfloat16) for tile in tiles), *((tile, torch.float16) for tile in in_fp16)]
    return pytest.mark.parametrize(("tile", "dtype"), both, ids=str)


@pytest.mark.gpu
@needs_hopper
@each_tile("linear")
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(assert_matches, tile, shape, dtype):
    for m in (1, tile.block_m, tile.width - 1, tile.width, 2 * tile.width + 3):
        x, weight, bias = case(m, *shape, dtype, bias=True)
        out = hopper_product(x, *weight, bias, tile)
        exact = reference.linear(x, weight, bias)
        assert_matches(out, exact, reference.linear(*absolute(x, weight, bias)))
        assert torch.equal(out, hopper_product(x, *weight, bias, tile))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", [tile for tile in hopper_candidates("linear", 1) if tile.shared], ids=str)
def test_tiles_are_shared_after_whole_ones(assert_matches, tile):
    """Often, as programs hand over to each other: each time the same bits, and all flags are lowered again."""
    device = torch.device("cuda", torch.cuda.current_device())
    m = 300 * tile.rows // 1296 * tile.width + 3
    assert hopper_schedule(tile, m, 1296, 4112, card_of(device).hopper_processors).waves > 0
    for n, k, tokens in ((1296, 4112, m), (6144, 4096, tile.width), (64, 16384, 3)):
        x, weight, _ = case(tokens, n, k, torch.bfloat16)
        out = hopper_product(x, *weight, None, tile)
        assert_matches(out, reference.linear(x, weight), reference.linear(*absolute(x, weight)))
        assert all(torch.equal(out, hopper_product(x, *weight, None, tile)) for _ in range(20))
    assert not _flags(device, torch.cuda.current_stream().cuda_stream).any()


@pytest.mark.gpu
@needs_hopper
def test_streams_have_flags_of_their_own():
    tile = replace(HOPPER_TILES[0], shared=True)
    x, weight, _ = case(16, 4096, 4096, torch.bfloat16)
    out = hopper_product(x, *weight, None, tile)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs = []
    for stream in streams * 20:
        with torch.cuda.stream(stream):
            outs.append(hopper_product(x, *weight, None, tile))
    torch.cuda.synchronize()
    assert all(torch.equal(out, each) for each in outs)
    device = torch.device("cuda", torch.cuda.current_device())
    assert len({_flags(device, stream.cuda_stream).data_ptr() for stream in streams}) == 3


@pytest.mark.gpu
@needs_hopper
@each_tile("swiglu")
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(assert_matches, tile, shape, dtype):
    for m in (1, tile.block_m, tile.width - 1, tile.width, 2 * tile.width + 3):
        x, weight, _ = case(m, *shape, dtype)
        gates, ups = reference.linear(*absolute(x, weight)).chunk(2, dim=-1)
        out = hopper_product(x, *weight, None, tile, fused=True)
        assert_matches(out, reference.swiglu(x, weight), gates * ups)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", HOPPER_TILES, ids=str)
def test_a_row_does_not_depend_on_the_others(tile):
    x, weight, _ = case(tile.width + 5, 336, 1040, torch.bfloat16)
    whole = hopper_product(x, *weight, None, tile)
    assert torch.equal(whole[-1:], hopper_product(x[-1:].contiguous(), *weight, None, tile))


@pytest.mark.gpu
@needs_hopper
def test_every_int8_value_is_widened_exactly():
    values = torch.arange(-128, 128, dtype=torch.int8, device="cuda").repeat(128, 1)
    x = torch.eye(256, device="cuda", dtype=torch.bfloat16)
    out = hopper_product(x, values, torch.ones(128, device="cuda", dtype=torch.float16), None, HOPPER_TILES[-1])
    assert torch.equal(out, values.T.to(torch.bfloat16))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("op", "n", "k"), [("linear", 64, 1032), ("swiglu", 40, 1040)])
def test_operands_that_tma_cannot_read_take_the_other_kernel(assert_matches, op, n, k):
    x, weight, _ = case(40, n, k, torch.bfloat16)
    assert isinstance(choose(op, x, weight.values), TritonTile)
    assert aligned(x, weight.values) == (op == "swiglu"), "half of the rows is not a multiple of 8"
    magnitude = reference.linear(*absolute(x, weight))
    if op == "swiglu":
        gates, ups = magnitude.chunk(2, dim=-1)
        assert_matches(ops.swiglu(x, *weight), reference.swiglu(x, weight), gates * ups)
    else:
        assert_matches(ops.linear(x, *weight), reference.linear(x, weight), magnitude)


def test_flags_are_not_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capture: call one before"):
        _flags_of_streams.__wrapped__(torch.device("cuda", 0), 0)


@given(
    op=st.sampled_from(["linear", "swiglu"]),
    m=st.integers(1, 20_000),
    n=st.integers(1, 200_000),
    k=st.integers(16, 60_000),
    processors=st.sampled_from([78, 114, 132]),
)
def test_the_chosen_tile_fits(op, m, n, k, processors):
    tile = pick_hopper_tile(op, m, n, k, processors)
    if tile is None:
        assert m <= 16
        return
    ring = tile.stages * tile.deep * (tile.rows + 2 * tile.width) * tile.block_k
    sums = 4 * (tile.deep - 1) * tile.rows * tile.width
    assert ring + sums <= SHARED_MEMORY - 4096
    assert tile.stages >= 3
    assert op == "linear" or not tile.shared


@given(
    tile=st.sampled_from(hopper_candidates("linear", 1)),
    m=st.integers(1, 20_000),
    n=st.integers(1, 200_000),
    k=st.integers(16, 60_000),
    processors=st.sampled_from([78, 114, 132]),
)
def test_every_program_has_work(tile, m, n, k, processors):
    """And where tiles are shared, less than two tiles' worth beyond the whole ones."""
    programs, waves = hopper_schedule(tile, m, n, k, processors)
    tiles, steps = -(-m // tile.width) * -(-n // tile.rows), -(-k // (tile.deep * tile.block_k))
    assert 0 < programs <= processors
    if not tile.shared:
        assert programs <= tiles
        return
    shared = (tiles - waves * programs) * steps
    assert programs <= shared < 2 * programs * steps
    assert shared * programs < 2**31, "the kernel counts in 32 bits"


@pytest.mark.parametrize(
    ("op", "m", "n", "k", "taken"),
    [
        ("linear", 1, 28672, 4096, False),
        ("linear", 2, 28672, 4096, True),
        ("linear", 16, 8192, 1024, True),
        ("linear", 16, 6144, 4096, True),
        ("linear", 16, 4096, 14336, True),
        ("linear", 16, 6144, 2048, False),
        ("linear", 8, 1536, 1536, False),
        ("linear", 8, 1536, 8960, True),
        ("linear", 17, 4096, 4096, True),
        ("swiglu", 1, 28672, 4096, False),
        ("swiglu", 2, 9728, 896, True),
    ],
)
def test_it_is_taken_where_it_was_the_faster_one(op, m, n, k, taken):
    assert (pick_hopper_tile(op, m, n, k, 132) is not None) is taken


def test_large_products_take_the_tile_with_the_most_reuse():
    tile = pick_hopper_tile("linear", 8192, 28672, 4096, 132)
    assert replace(tile, shared=False) == HopperTile(256, 64, across=2, deep=1)
