"""INT8 activations: the rotation, the rounding of tokens, and the operators on the CPU, bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rowint8.kernels import cpu_int8, ops, reference
from rowint8.kernels.activations import LARGEST_K, quantize_tokens, rotate, rotation_block, scale_factor
from rowint8.kernels.cpu_build import library
from rowint8.kernels.quantize import Int8Weight, dequantize, quantize_rowwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
WIDTHS = [(1, 1), (7, 1), (48, 16), (576, 64), (1536, 256), (4096, 256), (0, 16), (576, 1), (99, 1)]
"""Columns, and how many are rotated together."""
SHAPES = [(1, 1), (1, 64), (64, 1), (8, 13), (48, 64), (130, 96), (96, 435), (960, 576)]


def hadamard(size):
    """The orthonormal matrix, fp64, by Sylvester's rule."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def rotated(x, block):
    """x H in fp64."""
    return (x.double().unflatten(-1, (x.shape[-1] // block, block)) @ hadamard(block)).flatten(-2)


def tokens_like(leading, k):
    """INT8 tokens and their scales."""
    q = torch.randint(-127, 128, (*leading, k), dtype=torch.int8)
    return q, torch.rand(leading) + 0.5


def product_case(n, k, leading, bias):
    tokens = tokens_like(leading, k)
    weight = quantize_rowwise(torch.randn(n, k))
    return tokens, weight, torch.randn(n) if bias else None


def expected(tokens, token_scale, weight, bias, dtype):
    """From the exact sums, in fp32 in the order that the operator states; fp64 holds the one product it fuses."""
    by_row = weight.scale.float() * reference.int8_sums(tokens, weight.values).float()
    if bias is None:
        return (token_scale[..., None] * by_row).to(dtype)
    return (token_scale.double()[..., None] * by_row.double() + bias.double()).float().to(dtype)


@pytest.mark.parametrize(("k", "block"), [(4096, 256), (576, 64), (1536, 256), (96, 32), (48, 16), (24, 1), (99, 1)])
def test_the_block_is_the_largest_power_of_two_that_divides_the_columns(k, block):
    assert rotation_block(k) == block


def test_a_smaller_block_can_be_asked_for():
    assert [rotation_block(1536, largest) for largest in (16, 64, 128)] == [16, 64, 128]


@pytest.mark.parametrize(("k", "block"), WIDTHS)
def test_rotation_is_the_hadamard_matrix_and_its_own_inverse(k, block):
    x = torch.randn(3, 5, k)
    assert torch.allclose(rotate(x, block).double(), rotated(x, block), atol=1e-5)
    assert torch.allclose(rotate(rotate(x, block), block), x, atol=1e-5)


@pytest.mark.parametrize(("k", "block"), WIDTHS)
def test_a_rotated_weight_is_rounded_by_the_one_rule(k, block):
    weight = torch.randn(300, k).bfloat16()
    by_rows, whole = quantize_rowwise(weight, block=block), quantize_rowwise(rotate(weight, block))
    assert torch.equal(by_rows.values, whole.values)
    assert torch.equal(by_rows.scale, whole.scale)
    off = (rotate(dequantize(by_rows), block) - weight.float()).norm()
    assert off <= 0.01 * weight.float().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "block"), WIDTHS)
@pytest.mark.parametrize("leading", [(1,), (33,), (2, 5), (0,), ()])
def test_tokens_are_rounded_to_half_a_step(dtype, k, block, leading):
    x = (torch.randn(*leading, k) * torch.rand(*leading, 1).exp()).to(dtype)
    q, scale = ops.quantize_tokens(x, block)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert (q.shape, scale.shape) == (x.shape, x.shape[:-1])
    assert q.abs().max() == 127 if q.numel() else True
    off = (q.double() * scale.double()[..., None] - rotated(x, block)).abs()
    assert torch.all(off <= scale.double()[..., None] * (0.5 + 2e-4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "block"), WIDTHS)
@pytest.mark.parametrize("m", [1, 3, 17, 256])
def test_the_operator_has_the_bits_of_the_plain_arithmetic(dtype, k, block, m):
    x = torch.randn(m, k).to(dtype)
    for one, plain in zip(ops.quantize_tokens(x, block), quantize_tokens(x, block), strict=True):
        assert torch.equal(one, plain)


def test_halves_go_to_the_even_neighbour():
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 3.5, -126.5]])
    q, scale = ops.quantize_tokens(x, 1)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, 4, -126]]
    assert scale.item() == torch.tensor(127 * scale_factor(1), dtype=torch.float32).item()


@pytest.mark.parametrize("block", [1, 16, 64])
def test_tokens_of_zeros_nan_infinity_and_tiny_numbers(block):
    x = torch.randn(7, 64)
    clean = ops.quantize_tokens(x, block)
    x[1], x[3, 5], x[4, 6], x[6] = 0, math.nan, -math.inf, 1e-40
    q, scale = ops.quantize_tokens(x, block)
    assert not q[[1, 3, 4, 6]].any()
    assert scale[[3, 4]].isnan().all()
    assert scale[[1, 6]].isfinite().all()
    assert torch.equal(q[[0, 2, 5]], clean[0][[0, 2, 5]])
    assert torch.equal(scale[[0, 2, 5]], clean[1][[0, 2, 5]])
    weight, bias = quantize_rowwise(torch.randn(9, 64)), torch.randn(9)
    out = ops.linear_int8(q, scale, *weight, bias, torch.float32)
    assert out[[3, 4]].isnan().all()
    assert torch.equal(out[1], bias)
    assert ops.swiglu_int8(q, scale, weight.values[:8], weight.scale[:8])[[3, 4]].isnan().all()


@pytest.mark.parametrize("block", [1, 256])
def test_the_largest_numbers_stay_whole(block):
    """What overflows in the rotation is NaN, and what does not keeps its size."""
    x = torch.full((1, 256), 2.0**110)
    q, scale = ops.quantize_tokens(x, block)
    assert torch.isfinite(scale).all()
    assert abs(q.double().square().sum().sqrt() * scale.item() / (2.0**110 * 16) - 1) < 1e-6
    assert ops.quantize_tokens(x * 2**17.9, 256)[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(1,), (17,), (2, 5), (0,), ()])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_has_the_bits_of_integer_arithmetic(dtype, shape, leading, bias):
    tokens, weight, b = product_case(*shape, leading, bias)
    out = ops.linear_int8(*tokens, *weight, b, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, expected(*tokens, weight, b, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1), (14, 13), (96, 64), (3072, 576)])
@pytest.mark.parametrize("leading", [(1,), (17,), (2, 5), (0,)])
def test_swiglu_is_rounded_once(assert_matches, dtype, shape, leading):
    tokens, weight, _ = product_case(*shape, leading, False)
    weight = Int8Weight(weight.values, (weight.scale / shape[1] ** 0.5 / 64).half())  # where SiLU is not flat
    out = ops.swiglu_int8(*tokens, *weight, dtype)
    assert out.dtype == dtype
    gate, up = expected(*tokens, weight, None, torch.float32).chunk(2, dim=-1)
    exact = reference.swiglu_int8(*tokens, weight)
    assert_matches(out, exact, (gate * up).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_among_255_others(dtype):
    x, residual, norm = torch.randn(256, 576).to(dtype), torch.randn(256, 576).to(dtype), torch.randn(576).to(dtype)
    weight = quantize_rowwise(torch.randn(192, 576), block=64)

    def run(rows):
        q, scale, total = ops.add_rms_norm_int8(x[rows], residual[rows], norm, EPS, 64)
        out = ops.linear_int8(q, scale, *weight, None, dtype)
        return out, ops.swiglu_int8(q, scale, *weight, dtype), total

    together = run(slice(None))
    for row in (0, 100, 255):
        for alone, among in zip(run(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], among[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "block"), [(576, 64), (7, 1), (4096, 256)])
def test_the_norm_hands_out_what_rounding_after_it_would(dtype, h, block):
    x, residual, weight = torch.randn(2, 5, h).to(dtype), torch.randn(2, 5, h).to(dtype), torch.randn(h).to(dtype)
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    together = ops.add_rms_norm_int8(x, residual, weight, EPS, block)
    for one, other in zip(together, (*ops.quantize_tokens(normed, block), total), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_compiler_the_bits_are_the_same(assert_matches, monkeypatch, dtype, bias):
    assert library() is not None, "this machine has no C compiler"
    x = torch.randn(33, 576).to(dtype)
    weight, b = quantize_rowwise(torch.randn(97, 576), block=64), torch.randn(97) if bias else None

    def run():
        tokens = ops.quantize_tokens(x, 64)
        return *tokens, ops.linear_int8(*tokens, *weight, b, dtype)

    built = run()
    monkeypatch.setattr(cpu_int8, "library", lambda: None)
    for one, other in zip(built, run(), strict=True):
        assert torch.equal(one, other)
    gates = Int8Weight(weight.values[:96], (weight.scale[:96] / 32).half())
    tokens = ops.quantize_tokens(x, 64)
    exact = reference.swiglu_int8(*tokens, gates)
    assert_matches(ops.swiglu_int8(*tokens, *gates, dtype), exact, exact.abs())


@pytest.mark.parametrize(("compiler", "reason"), [("false", ""), ("no-such-cc", "no-such-cc"), (None, "no cc")])
def test_where_nothing_can_be_built_one_warning_says_why(monkeypatch, tmp_path, caplog, compiler, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", compiler)
    with caplog.at_level("WARNING"):
        assert library.__wrapped__() is None
    assert len(caplog.messages) == 1
    assert "run in plain torch" in caplog.text
    assert reason in caplog.text
    assert list(tmp_path.glob("rowint8/*")) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_operands_give_the_plain_product(dtype):
    """The chain against the unrounded product, within what two roundings to 8 bits leave of Gaussian operands."""
    x, weight = torch.randn(64, 1536).to(dtype), torch.randn(96, 1536) / 1536**0.5
    rows = quantize_rowwise(weight, block=256)
    out = ops.linear_int8(*ops.quantize_tokens(x, 256), *rows, None, torch.float32)
    exact = x.double() @ weight.double().T
    assert (out - exact).norm() < 0.015 * exact.norm()


def test_an_outlier_costs_a_token_little():
    x, weight = torch.randn(16, 1024), torch.randn(96, 1024)
    x[:, 17] += 300
    exact = x.double() @ weight.double().T

    def error(block):
        rows = quantize_rowwise(weight, block=block)
        out = ops.linear_int8(*ops.quantize_tokens(x, block), *rows, None, torch.float32)
        return (out - exact).norm() / exact.norm()

    assert error(256) < error(1) / 2


@settings(deadline=None, max_examples=60)
@given(m=st.integers(0, 9), n=st.integers(0, 40), k=st.integers(0, 80), seed=st.integers(0, 2**31))
def test_any_shape(m, n, k, seed):
    torch.manual_seed(seed)
    block = rotation_block(k)
    q, scale = ops.quantize_tokens(torch.randn(m, k), block)
    weight = quantize_rowwise(torch.randn(n, k), block=block)
    assert torch.equal(
        ops.linear_int8(q, scale, *weight, None, torch.float32), expected(q, scale, weight, None, torch.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (2, 20)])
def test_opcheck(dtype, leading):
    library = torch.ops.rowint8
    x, residual, norm = torch.randn(*leading, 64).to(dtype), torch.randn(*leading, 64).to(dtype), torch.randn(64)
    torch.library.opcheck(library.quantize_tokens.default, (x, 64))
    torch.library.opcheck(library.quantize_tokens.default, (x.mT, 1))
    torch.library.opcheck(library.add_rms_norm_int8.default, (x, residual, norm.to(dtype), EPS, 16))
    tokens, weight, bias = product_case(24, 32, leading, True)
    torch.library.opcheck(library.linear_int8.default, (*tokens, *weight, bias, dtype))
    torch.library.opcheck(library.linear_int8.default, (*tokens, *weight, None, dtype))
    torch.library.opcheck(library.swiglu_int8.default, (*tokens, *weight, dtype))


def test_compiles_without_graph_breaks():
    x, residual, norm = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    weight = quantize_rowwise(torch.randn(64, 32), block=32)

    def layer(x):
        q, scale, total = ops.add_rms_norm_int8(x, residual, norm, EPS, 32)
        return ops.swiglu_int8(q, scale, *weight, torch.float32) + total

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), layer(x))


BAD_PRODUCTS = [
    ("plain tokens", lambda q, s, w: (q.float(), s, *w), "tokens must be int8"),
    ("K differs", lambda q, s, w: (q[:, :-1], s, *w), "do not match a weight of K = 32"),
    ("fp16 token scale", lambda q, s, w: (q, s.half(), *w), r"token_scale must be float32 \[5\]"),
    ("token scale [M, 1]", lambda q, s, w: (q, s[:, None], *w), r"got torch.float32 \[5, 1\]"),
    ("fp32 scale", lambda q, s, w: (q, s, w.values, w.scale.float()), "scale must be float16"),
    ("other device", lambda q, s, w: (q, s.to("meta"), *w), "scales must be there too"),
]


@pytest.mark.parametrize(("arguments", "message"), [c[1:] for c in BAD_PRODUCTS], ids=[c[0] for c in BAD_PRODUCTS])
@pytest.mark.parametrize("operator", [ops.linear_int8, ops.swiglu_int8])
def test_products_refuse(operator, arguments, message):
    tokens, weight, _ = product_case(24, 32, (5,), False)
    with pytest.raises(ValueError, match=message):
        operator(*arguments(*tokens, weight))


def test_products_refuse_other_outputs_odd_gates_and_sums_beyond_int32():
    tokens, weight, _ = product_case(7, 32, (5,), False)
    with pytest.raises(ValueError, match="float64; accepted are"):
        ops.linear_int8(*tokens, *weight, None, torch.float64)
    with pytest.raises(ValueError, match="7 is odd"):
        ops.swiglu_int8(*tokens, *weight)
    wide = torch.ones(1, LARGEST_K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"int32 sums hold up to {LARGEST_K}"):
        ops.linear_int8(wide, torch.ones(1), wide, torch.ones(1, dtype=torch.float16))


@pytest.mark.parametrize("block", [0, 2, 3, 32, 512, -1])
def test_blocks_that_do_not_fit_are_refused(block):
    with pytest.raises(ValueError, match="no rotation, and what divides the columns of 16, 32, 64, 128, 256"):
        ops.quantize_tokens(torch.randn(2, 48), block)
