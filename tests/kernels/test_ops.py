"""The operators: the CPU path against the fp64 oracle, schema checks, tracing, and what they refuse."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rowint8.kernels import cpu, ops, reference
from rowint8.kernels.quantize import quantize_rowwise
from tests.kernels.cases import absolute

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 64), (64, 1), (7, 13), (48, 64), (130, 96), (1311 // 3, 435)]
LEADING = [(1,), (3,), (17,), (2, 5), (0,)]


def case(n, k, leading, dtype, bias=False):
    weight = quantize_rowwise(torch.randn(n, k) / max(1, k) ** 0.5)
    return torch.randn(*leading, k).to(dtype), weight, torch.randn(n).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_on_the_cpu(assert_matches, dtype, shape, leading, bias):
    x, weight, b = case(*shape, leading, dtype, bias)
    out = ops.linear(x, *weight, b)
    assert out.dtype == dtype
    product = reference.linear(x, weight)  # ATen's packed product rounds it before scale and bias follow
    assert_matches(out, reference.linear(x, weight, b), reference.linear(*absolute(x, weight, b)), product)


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (300, 576)])
@pytest.mark.parametrize("tokens", [17, 130])
def test_many_bf16_tokens_on_either_kind_of_cpu(assert_matches, monkeypatch, tokens, shape, bf16_products):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: bf16_products)
    x, weight, bias = case(*shape, (tokens,), torch.bfloat16, bias=True)
    out, product = ops.linear(x, *weight, bias), reference.linear(x, weight)
    rounded = [product] if bf16_products else []
    assert_matches(out, reference.linear(x, weight, bias), reference.linear(*absolute(x, weight, bias)), *rounded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1), (14, 13), (96, 64), (130, 96)])
@pytest.mark.parametrize("leading", LEADING)
def test_swiglu_on_the_cpu(assert_matches, dtype, shape, leading):
    x, weight, _ = case(*shape, leading, dtype)
    out = ops.swiglu(x, *weight)
    assert out.dtype == dtype
    gate, up = reference.linear(x, weight).chunk(2, dim=-1)
    # The CPU path rounds each of gate and up twice and silu(gate) once; silu'(gate) * gate is at most 1.1 |gate|.
    rounded = [1.1 * gate * up] * 5
    gates, ups = reference.linear(*absolute(x, weight)).chunk(2, dim=-1)
    assert_matches(out, reference.swiglu(x, weight), gates * ups, *rounded)


@pytest.mark.parametrize("leading", [(3,), (2, 20)])
def test_bf16_scale_is_not_rounded_to_bf16(leading):
    """A scale of 1 + 2^-10 vanishes in bf16; it must show in an output that can hold it."""
    values = torch.full((4, 32), 64, dtype=torch.int8)
    scale = torch.full((4,), 1 + 2**-10, dtype=torch.float16)
    x = torch.ones(*leading, 32, dtype=torch.bfloat16)
    exact = 64 * 32 * (1 + 2**-10)
    bias = torch.full((4,), -64.0 * 32)
    out = ops.linear(x, values, scale, bias)
    assert torch.allclose(out.double(), torch.full_like(out, exact - 64 * 32).double())


def test_empty_weights():
    x = torch.randn(3, 5)
    assert ops.linear(x, *quantize_rowwise(torch.empty(0, 5))).shape == (3, 0)
    bias = torch.arange(4.0)
    out = ops.linear(x[:, :0], *quantize_rowwise(torch.empty(4, 0)), bias)
    assert torch.equal(out, bias.expand(3, 4))


def norm_case(leading, h, dtype):
    x, residual = torch.randn(2, *leading, h).to(dtype)
    return x, residual, torch.randn(h).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 7, 576, 4096])
@pytest.mark.parametrize("leading", [*LEADING, ()])
def test_add_rms_norm_on_the_cpu(assert_matches, dtype, h, leading):
    x, residual, weight = norm_case(leading, h, dtype)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    exact, exact_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert_matches(total, exact_total, exact_total)
    # Rounding the sum moves each element and the root of their mean square; the normalized value is rounded as well.
    assert_matches(normed, exact, exact, *[exact] * 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_has_the_bits_of_hugging_face(dtype):
    x, residual, weight = norm_case((2, 17), 576, dtype)
    layer = LlamaRMSNorm(576, eps=1e-5).to(dtype)
    layer.weight.data.copy_(weight)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, layer(x + residual))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_add_rms_norm_of_strided_tensors(device):
    base = torch.randn(3, 2, 40, 9, device=device)
    x, residual, weight = base[0].mT[..., ::2], base[1, :, :, 0], base[2, 0, ::2, 1]
    residual = residual[:, None, ::2].expand(x.shape)
    assert not any(t.is_contiguous() for t in (x, residual, weight))
    out = ops.add_rms_norm(x, residual, weight, 1e-5)
    copied = ops.add_rms_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(out, copied, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (2, 20)])
def test_opcheck(dtype, leading):
    x, weight, bias = case(24, 32, leading, dtype, bias=True)
    torch.library.opcheck(torch.ops.rowint8.linear.default, (x, *weight))
    torch.library.opcheck(torch.ops.rowint8.linear.default, (x, *weight, bias))
    torch.library.opcheck(torch.ops.rowint8.swiglu.default, (x, *weight))
    x, residual, weight = norm_case(leading, 32, dtype)
    torch.library.opcheck(torch.ops.rowint8.add_rms_norm.default, (x, residual, weight, 1e-5))
    torch.library.opcheck(
        torch.ops.rowint8.add_rms_norm.default, (x.mT, residual.mT, weight.new_ones(x.shape[-2]), 1e-5)
    )


def test_compiles_without_graph_breaks():
    x, weight, bias = case(24, 32, (5,), torch.float32, bias=True)
    _, residual, norm = norm_case((5,), 32, torch.float32)

    def layer(x):
        normed, total = ops.add_rms_norm(x, residual, norm, 1e-5)
        return ops.swiglu(ops.linear(normed, *weight, bias)[:, :8].repeat(1, 4).relu(), *weight) + total[:, :12]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


BAD_ARGUMENTS = [
    ("float64 activations", lambda x, w: (x.double(), *w), "accepted are float32, bfloat16 and float16"),
    ("K differs", lambda x, w: (x[:, :-1], *w), "do not match a weight of K = 32"),
    ("fp32 scale", lambda x, w: (x, w.values, w.scale.float()), "scale must be float16"),
    ("scale [N, 1]", lambda x, w: (x, w.values, w.scale[:, None]), "scale must be float16"),
    ("float values", lambda x, w: (x, w.values.float(), w.scale), "contiguous int8 matrix"),
    ("transposed values", lambda x, w: (x, w.values.T, w.scale), "contiguous int8 matrix"),
    ("other device", lambda x, w: (x.to("meta"), *w), "activations are on meta"),
]


@pytest.mark.parametrize(("arguments", "message"), [c[1:] for c in BAD_ARGUMENTS], ids=[c[0] for c in BAD_ARGUMENTS])
@pytest.mark.parametrize("operator", [ops.linear, ops.swiglu])
def test_refuses(operator, arguments, message):
    x, weight, _ = case(24, 32, (5,), torch.float32)
    with pytest.raises(ValueError, match=message):
        operator(*arguments(x, weight))


def test_refuses_odd_swiglu_and_wrong_bias():
    x, weight, _ = case(7, 32, (5,), torch.float32)
    with pytest.raises(ValueError, match="7 is odd"):
        ops.swiglu(x, *weight)
    with pytest.raises(ValueError, match=r"bias must be \[7\]"):
        ops.linear(x, *weight, torch.zeros(8))


BAD_NORMS = [
    ("float64", lambda x, r, w: (x.double(), r.double(), w.double()), "accepted are float32, bfloat16 and float16"),
    ("scalar", lambda x, r, w: (x[0, 0], r[0, 0], w), "got a scalar"),
    ("residual of another shape", lambda x, r, w: (x, r[:1], w), r"residual must be torch.float32 \[5, 32\]"),
    ("residual of another dtype", lambda x, r, w: (x, r.half(), w), r"got torch.float16 \[5, 32\]"),
    ("short weight", lambda x, r, w: (x, r, w[1:]), r"norm weight must be torch.float32 \[32\]"),
    ("weight of another dtype", lambda x, r, w: (x, r, w.bfloat16()), r"got torch.bfloat16 \[32\]"),
    ("weight [1, H]", lambda x, r, w: (x, r, w[None]), r"got torch.float32 \[1, 32\]"),
    ("residual elsewhere", lambda x, r, w: (x, r.to("meta"), w), "activations are on cpu"),
    ("weight elsewhere", lambda x, r, w: (x, r, w.to("meta")), "activations are on cpu"),
]


@pytest.mark.parametrize(("arguments", "message"), [c[1:] for c in BAD_NORMS], ids=[c[0] for c in BAD_NORMS])
def test_add_rms_norm_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.add_rms_norm(*arguments(*norm_case((5,), 32, torch.float32)), 1e-5)
