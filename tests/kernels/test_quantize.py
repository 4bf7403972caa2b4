"""The format and its rounding rule, edge by edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rowint8.kernels.quantize import BLOCK_ELEMENTS, Int8Weight, check_stored, dequantize, quantize_rowwise

TINY_FP16 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_bytes_of_a_square_weight():
    weight = quantize_rowwise(torch.randn(2048, 2048))
    assert weight.nbytes == 4_198_400
    assert torch.empty(2048, 2048, dtype=torch.bfloat16).nbytes == 8_388_608


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_against_fp64(dtype):
    source = (torch.randn(96, 257, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    weight = quantize_rowwise(source)
    wide = source.double()
    assert torch.equal(weight.scale, (wide.abs().amax(1) / 127).half())
    exact = wide / weight.scale.double()[:, None]
    rounded = exact.round()
    not_a_tie = ((exact - exact.floor()) - 0.5).abs() > 1e-4
    assert torch.equal(weight.values.double()[not_a_tie], rounded[not_a_tie])
    assert (weight.values.double() - exact).abs().max() <= 0.5 + 1e-4


def test_ties_go_to_even():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    weight = quantize_rowwise(row)
    assert weight.scale.item() == 1.0
    assert weight.values.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_values_use_the_stored_scale():
    row = torch.tensor([[1.0, 0.3337]])
    weight = quantize_rowwise(row)
    stored = weight.scale.float().item()
    assert stored != 1.0 / 127
    assert weight.values.tolist() == [[round(1.0 / stored), round(0.3337 / stored)]]


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(0, 9),
    k=st.integers(0, 33),
    exponent=st.integers(-40, 22),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_never_clips_and_stays_within_half_a_step(n, k, exponent, dtype, seed):
    source = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    source = source.clamp(-60000, 60000).to(dtype)
    weight = quantize_rowwise(source)
    assert weight.values.shape == (n, k)
    assert weight.scale.shape == (n,)
    assert weight.values.dtype == torch.int8
    assert weight.scale.dtype == torch.float16
    assert torch.isfinite(weight.scale).all()
    assert (weight.values.int().abs() <= 127).all()
    step = weight.scale.double()[:, None]
    error = (weight.values.double() * step - source.double()).abs()
    assert (error <= step * (0.5 + 1e-6)).all()


@settings(deadline=None, max_examples=100)
@given(absmax=st.floats(2.0**-40, 0.01))
def test_coarse_subnormal_scales_round_up_rather_than_clip(absmax):
    source = torch.tensor([[absmax, -absmax, absmax / 3]])
    weight = quantize_rowwise(source)
    ratio = (source.double().abs().max() / weight.scale.double()).item()
    assert ratio < 127.5
    below = (weight.scale.view(torch.int16) - 1).view(torch.float16).double().item()
    nearest = (source.abs().max() / 127).half()
    assert weight.scale.item() == nearest.item() or source.double().max().item() / max(below, 1e-30) >= 127.5


def test_zero_rows():
    weight = quantize_rowwise(torch.tensor([[0.0, 0.0], [1.0, -0.5], [0.0, -0.0]]))
    assert weight.scale.tolist()[0] == weight.scale.tolist()[2] == 0
    assert weight.values[[0, 2]].eq(0).all()
    assert dequantize(weight)[[0, 2]].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 1e-7, 1e4])
def test_every_written_row_is_one_that_may_be_stored(dtype, factor):
    weight = (torch.randn(9, 40) * factor).to(dtype)
    weight[4] = 0
    check_stored(quantize_rowwise(weight), "w")


@pytest.mark.parametrize("scale", [0.0, -0.0, -6e-8, float("nan"), float("inf"), -float("inf")])
def test_scales_that_no_row_has_are_named(scale):
    weight = quantize_rowwise(torch.randn(9, 40))
    weight.scale[7] = scale
    with pytest.raises(
        ValueError, match=r"w_scale: row 7 is (-?0\.0, no scale of a row that is not zeros|.*, not a fin)"
    ):
        check_stored(weight, "w")


def test_smallest_weights_get_the_smallest_scale():
    weight = quantize_rowwise(torch.tensor([[1e-9, -1e-9]]))
    assert weight.scale.item() == TINY_FP16
    assert weight.values.tolist() == [[0, 0]]


def test_largest_row_and_the_one_too_large():
    assert quantize_rowwise(torch.tensor([[8.31e6]])).values.item() == 127
    with pytest.raises(ValueError, match=r"layers\.3\.o_proj\.weight: row 1 is too large"):
        quantize_rowwise(torch.tensor([[1.0], [8.4e6]]), name="layers.3.o_proj.weight")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_name_the_tensor_and_the_row(bad):
    k = BLOCK_ELEMENTS // 4
    source = torch.ones(9, k, dtype=torch.bfloat16)
    source[6, k - 1] = bad
    with pytest.raises(ValueError, match=r"^up_proj: row 6 holds NaN or Inf"):
        quantize_rowwise(source, name="up_proj")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="accepted are float32, bfloat16 and float16"):
        quantize_rowwise(torch.zeros(2, 2).to(dtype))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_only_matrices(shape):
    with pytest.raises(ValueError, match=r"expected a matrix \[N, K\]"):
        quantize_rowwise(torch.zeros(shape))


def test_rows_are_independent_so_stacking_commutes():
    gate, up = torch.randn(5, 40), torch.randn(5, 40) * 3
    both = quantize_rowwise(torch.cat([gate, up]))
    parts = [quantize_rowwise(gate), quantize_rowwise(up)]
    assert torch.equal(both.values, torch.cat([p.values for p in parts]))
    assert torch.equal(both.scale, torch.cat([p.scale for p in parts]))


def test_non_contiguous_input():
    source = torch.randn(33, 7).T
    assert torch.equal(quantize_rowwise(source).values, quantize_rowwise(source.contiguous()).values)
    assert quantize_rowwise(source).values.is_contiguous()


def test_blocks_bound_the_extra_memory(monkeypatch):
    """The largest float tensor made on the way holds one block of rows, whatever the size of the weight."""
    seen = []
    plain = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: seen.append(t.numel()) or plain(t))
    rows = 40
    weight = torch.ones(rows, BLOCK_ELEMENTS // 16, dtype=torch.bfloat16)
    quantize_rowwise(weight)
    assert max(seen) <= BLOCK_ELEMENTS < weight.numel()


def test_dequantize_rounds_once():
    weight = Int8Weight(torch.tensor([[101]], dtype=torch.int8), torch.tensor([0.0123], dtype=torch.float16))
    exact = 101 * weight.scale.double()
    assert dequantize(weight, torch.bfloat16).item() == exact.to(torch.float32).to(torch.bfloat16).item()
