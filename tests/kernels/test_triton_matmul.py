"""The Triton kernels against the fp64 oracle: interpreted where there is no GPU, compiled where there is one.

Outputs are poisoned with NaN before every launch, shapes are awkward on purpose, inputs are fresh at every run.
"""

from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from rowint8.kernels import reference
from rowint8.kernels.dispatch import run
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.kernels.tiles.types import TritonTile
from tests.kernels.cases import absolute, case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Outputs are rounded to nearest, but the interpreter truncates to bf16, which costs a whole ulp.
HALF_ULP = {torch.bfloat16: 2.0**-7 if knobs.runtime.interpret else 2.0**-8}

interpreted = pytest.param("cpu", marks=pytest.mark.skipif(not knobs.runtime.interpret, reason="needs the interpreter"))
compiled = pytest.param("cuda", marks=pytest.mark.gpu)
pytestmark = [
    pytest.mark.parametrize("device", [interpreted, compiled]),
    pytest.mark.usefixtures("poison_empty"),
]

ONE_TOKEN = TritonTile(block_m=1, block_n=16, block_k=64, num_warps=2, num_stages=2)
DOT = TritonTile(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=2, group=2)
SHAPES = [(2, 1), (34, 64), (70, 131)]
TILE_AND_TOKENS = pytest.mark.parametrize(
    ("tile", "m"),
    [(ONE_TOKEN, 1), (ONE_TOKEN, 3), (DOT, 1), (DOT, 16), (DOT, 33)],
    ids=lambda v: getattr(v, "block_m", v),
)


@pytest.fixture
def check(assert_matches):
    """Runs an operator on a case, with a tile or with the one that is chosen, and compares."""

    def linear(x, weight, bias=None, tile=None):
        out = run("linear", x, *weight, bias, tile)
        assert out.dtype == x.dtype
        exact, magnitude = reference.linear(x, weight, bias), reference.linear(*absolute(x, weight, bias))
        assert_matches(out, exact, magnitude, half_ulp=HALF_ULP.get(x.dtype))

    def swiglu(x, weight, tile=None):
        out = run("swiglu", x, *weight, tile=tile)
        assert out.dtype == x.dtype
        gates, ups = reference.linear(*absolute(x, weight)).chunk(2, dim=-1)
        assert_matches(out, reference.swiglu(x, weight), gates * ups, half_ulp=HALF_ULP.get(x.dtype))

    return SimpleNamespace(linear=linear, swiglu=swiglu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [ONE_TOKEN, DOT], ids=lambda tile: tile.block_m)
def test_every_int8_value_is_widened_exactly(device, tile, dtype):
    """In each of the four bytes that are widened together."""
    values = torch.arange(-128, 128, dtype=torch.int8, device=device)[:, None].repeat(1, 64)
    x = torch.eye(64, dtype=dtype, device=device)[20:24]
    out = run("linear", x, values, torch.ones(256, dtype=torch.float16, device=device), tile=tile)
    assert torch.equal(out, values[:, 20:24].T.to(dtype))


@TILE_AND_TOKENS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(check, device, tile, dtype, shape, m, bias):
    x, weight, b = case(m, *shape, dtype, device, bias)
    check.linear(x, weight, b, tile)


@TILE_AND_TOKENS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(check, device, tile, dtype, shape, m):
    x, weight, _ = case(m, *shape, dtype, device)
    check.swiglu(x, weight, tile)


@pytest.mark.parametrize("m", [1, 3, 20])
def test_the_shipped_tiles_on_a_weight_larger_than_one_tile(check, device, m):
    x, weight, bias = case(m, 262, 1040, torch.bfloat16, device, bias=True)
    check.linear(x, weight, bias)
    check.swiglu(x, weight)


def test_extreme_gates(check, device):
    """silu saturates to 0 and to the identity without NaN, also where exp overflows."""
    weight = quantize_rowwise(torch.tensor([[100.0], [1.0]], device=device))
    x = torch.tensor([[-1e4], [-1.0], [0.0], [1.0], [1e4]], device=device)
    assert torch.isfinite(run("swiglu", x, *weight)).all()
    check.swiglu(x, weight)


def test_same_input_gives_the_same_bits(device):
    x, weight, _ = case(20, 96, 520, torch.bfloat16, device)
    for op in ("linear", "swiglu"):
        assert torch.equal(run(op, x, *weight), run(op, x, *weight))


def test_a_row_does_not_depend_on_the_others(device):
    x, weight, _ = case(40, 96, 520, torch.bfloat16, device)
    for op in ("linear", "swiglu"):
        assert torch.equal(run(op, x, *weight, tile=DOT)[7:8], run(op, x[7:8], *weight, tile=DOT))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (3, 0, 16), (3, 8, 0)])
def test_empty(device, m, n, k):
    weight = quantize_rowwise(torch.randn(n, k, device=device))
    x = torch.randn(m, k, device=device)
    bias = torch.randn(n, device=device)
    assert torch.equal(run("linear", x, *weight, bias), bias.expand(m, n))
    assert torch.equal(run("swiglu", x, *weight), torch.zeros(m, n // 2, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 100, 128, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (28672, 4096), (1311 * 2, 4352)])
def test_model_sized(check, device, m, dtype, n, k):
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    x, weight, _ = case(m, n, k, dtype, device)
    check.linear(x, weight)
    check.swiglu(x, weight)
