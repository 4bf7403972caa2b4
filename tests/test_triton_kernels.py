"""The Triton kernels against the fp64 oracle: interpreted where there is no GPU, compiled where there is one.

Outputs are poisoned with NaN before every launch, shapes are awkward on purpose, inputs are fresh at every run.
"""

import pytest
import torch
from triton import knobs

from rowint8.kernels import reference
from rowint8.kernels.int8_linear import int8_linear
from rowint8.kernels.int8_swiglu import int8_swiglu
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.kernels.tiles import TileConfig

# Inputs are exact and sums are fp32, so what is left is the rounding of each output to nearest: half an ulp, 2^-8 in
# bf16 and 2^-11 in fp16, plus the order of summation. The interpreter truncates to bf16, which costs a whole ulp.
BF16_ULP = 2.0**-7 if knobs.runtime.interpret else 2.0**-8
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: BF16_ULP + 1e-5, torch.float16: 2.0**-11 + 1e-5}

interpreted = pytest.param("cpu", marks=pytest.mark.skipif(not knobs.runtime.interpret, reason="needs the interpreter"))
compiled = pytest.param("cuda", marks=pytest.mark.gpu)
pytestmark = [
    pytest.mark.parametrize("device", [interpreted, compiled]),
    pytest.mark.usefixtures("poison_empty"),
]

ONE_TOKEN = TileConfig(block_m=1, block_n=16, block_k=64, num_warps=2, num_stages=2)
DOT = TileConfig(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=2, group=2)
SHAPES = [(2, 1), (34, 64), (70, 131)]
TILE_AND_TOKENS = pytest.mark.parametrize(
    ("tile", "m"),
    [(ONE_TOKEN, 1), (ONE_TOKEN, 3), (DOT, 1), (DOT, 16), (DOT, 33)],
    ids=lambda v: getattr(v, "block_m", v),
)


def use(tile, monkeypatch):
    for module in ("rowint8.kernels.int8_linear", "rowint8.kernels.int8_swiglu"):
        monkeypatch.setattr(f"{module}.pick_tile", lambda *shape: tile)


def case(m, n, k, dtype, device, bias=False):
    weight = quantize_rowwise(torch.randn(n, k, device=device) / k**0.5)
    b = torch.randn(n, device=device).to(dtype) if bias else None
    return torch.randn(m, k, device=device).to(dtype), weight, b


def assert_close(out, exact, dtype):
    assert out.dtype == dtype
    assert out.shape == exact.shape
    error = (out.double() - exact).norm()
    underflow = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the spacing of subnormal numbers
    allowed = TOLERANCE[dtype] * exact.norm() + underflow * exact.numel() ** 0.5
    assert error <= allowed, f"relative error {error / exact.norm():.2e}"


@TILE_AND_TOKENS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(monkeypatch, device, tile, dtype, shape, m, bias):
    use(tile, monkeypatch)
    x, weight, b = case(m, *shape, dtype, device, bias)
    assert_close(int8_linear(x, *weight, b), reference.linear(x, weight, b), dtype)


@TILE_AND_TOKENS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(monkeypatch, device, tile, dtype, shape, m):
    use(tile, monkeypatch)
    x, weight, _ = case(m, *shape, dtype, device)
    assert_close(int8_swiglu(x, *weight), reference.swiglu(x, weight), dtype)


@pytest.mark.parametrize("m", [1, 3, 20])
def test_the_shipped_tiles_on_a_weight_larger_than_one_tile(device, m):
    x, weight, bias = case(m, 262, 1040, torch.bfloat16, device, bias=True)
    assert_close(int8_linear(x, *weight, bias), reference.linear(x, weight, bias), torch.bfloat16)
    assert_close(int8_swiglu(x, *weight), reference.swiglu(x, weight), torch.bfloat16)


def test_extreme_gates(device):
    """silu saturates to 0 and to the identity without NaN, also where exp overflows."""
    weight = quantize_rowwise(torch.tensor([[100.0], [1.0]], device=device))
    x = torch.tensor([[-1e4], [-1.0], [0.0], [1.0], [1e4]], device=device)
    out = int8_swiglu(x, *weight)
    assert torch.isfinite(out).all()
    assert_close(out, reference.swiglu(x, weight), torch.float32)


def test_same_input_gives_the_same_bits(device):
    x, weight, _ = case(20, 96, 520, torch.bfloat16, device)
    assert torch.equal(int8_linear(x, *weight), int8_linear(x, *weight))
    assert torch.equal(int8_swiglu(x, *weight), int8_swiglu(x, *weight))


def test_a_row_does_not_depend_on_the_others(device, monkeypatch):
    use(DOT, monkeypatch)
    x, weight, _ = case(40, 96, 520, torch.bfloat16, device)
    assert torch.equal(int8_linear(x, *weight)[7:8], int8_linear(x[7:8], *weight))
    assert torch.equal(int8_swiglu(x, *weight)[7:8], int8_swiglu(x[7:8], *weight))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (3, 0, 16), (3, 8, 0)])
def test_empty(device, m, n, k):
    weight = quantize_rowwise(torch.randn(n, k, device=device))
    x = torch.randn(m, k, device=device)
    bias = torch.randn(n, device=device)
    assert torch.equal(int8_linear(x, *weight, bias), bias.expand(m, n))
    assert torch.equal(int8_swiglu(x, *weight), torch.zeros(m, n // 2, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 100, 128, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (28672, 4096), (1311 * 2, 4352)])
def test_model_sized(device, m, dtype, n, k):
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    x, weight, _ = case(m, n, k, dtype, device)
    assert_close(int8_linear(x, *weight), reference.linear(x, weight), dtype)
    assert_close(int8_swiglu(x, *weight), reference.swiglu(x, weight), dtype)
