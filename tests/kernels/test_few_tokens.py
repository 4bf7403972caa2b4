"""The kernel for up to 8 tokens against the fp64 oracle, and when it is taken. The interpreter does not run Gluon."""

import pytest
import torch

from rowint8.kernels import ops, reference
from rowint8.kernels.dispatch import aligned
from rowint8.kernels.few_tokens import few_tokens_product
from rowint8.kernels.tiles.pick import pick_few_tokens_tile
from rowint8.kernels.tiles.types import FewTokensTile
from tests.kernels.cases import absolute, case

pytestmark = pytest.mark.usefixtures("poison_empty")
TILES = [FewTokensTile(4, 1024), FewTokensTile(8, 1024), FewTokensTile(8, 2048), FewTokensTile(1, 128)]
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(2, 16), (50, 1040), (336, 4096), (1298, 2048)]
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@each_tile
def test_linear(assert_matches, tile, shape, dtype):
    for m in (1, 2, 7, 8):
        x, weight, bias = case(m, *shape, dtype, bias=True)
        out = few_tokens_product(x, *weight, bias, tile)
        assert_matches(out, reference.linear(x, weight, bias), reference.linear(*absolute(x, weight, bias)))
        assert torch.equal(out, few_tokens_product(x, *weight, bias, tile))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@each_tile
def test_swiglu(assert_matches, tile, shape, dtype):
    for m in (1, 2, 7, 8):
        x, weight, _ = case(m, *shape, dtype)
        gates, ups = reference.linear(*absolute(x, weight)).chunk(2, dim=-1)
        out = few_tokens_product(x, *weight, None, tile, fused=True)
        assert_matches(out, reference.swiglu(x, weight), gates * ups)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_int8_value_is_widened_exactly_wherever_it_lies(dtype):
    values = torch.arange(-128, 128, dtype=torch.int8, device="cuda")[:, None].repeat(1, 64)
    for first in range(0, 64, 8):
        x = torch.eye(64, dtype=dtype, device="cuda")[first : first + 8]
        scale = torch.ones(256, dtype=torch.float16, device="cuda")
        out = few_tokens_product(x, values, scale, None, TILES[0])
        assert torch.equal(out, values[:, first : first + 8].T.to(dtype))


@pytest.mark.gpu
@each_tile
def test_a_row_does_not_depend_on_the_others(tile):
    x, weight, _ = case(8, 336, 1040, torch.bfloat16)
    whole = few_tokens_product(x, *weight, None, tile)
    assert torch.equal(whole[-1:], few_tokens_product(x[-1:].contiguous(), *weight, None, tile))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1032, 1040])
def test_the_operators_take_it_where_they_can(assert_matches, k):
    x, weight, _ = case(5, 64, k, torch.bfloat16)
    assert aligned(x, weight.values) == (k == 1040)
    assert_matches(ops.linear(x, *weight), reference.linear(x, weight), reference.linear(*absolute(x, weight)))


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (1, 4096, None),
        (2, 4096, FewTokensTile(8, 2048)),
        (8, 6144, FewTokensTile(8, 1024)),
        (8, 28672, FewTokensTile(4, 1024)),
        (9, 28672, None),
    ],
)
def test_it_is_taken_for_two_to_eight_tokens(m, n, tile):
    assert pick_few_tokens_tile(m, n) == tile


def test_what_can_be_read_16_bytes_at_a_time():
    x, values = torch.empty(4, 64, dtype=torch.bfloat16), torch.empty(48, 64, dtype=torch.int8)
    assert aligned(x, values)
    assert not aligned(x.float(), values), "only 16-bit activations"
    assert not aligned(x[:, :40].contiguous(), values[:, :40].contiguous()), "K is not a multiple of 16"
    assert not aligned(x, values.flatten()[8:-56].view(47, 64)), "the address is not on 16 bytes"
