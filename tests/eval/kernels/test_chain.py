"""`rowint8 bench chain`: a chain computes a model's layers, and its row says what the products take alone and in it."""

import pytest
import torch

from rowint8.eval.kernels import chain as chains
from rowint8.eval.kernels import peers as kernel_peers
from rowint8.eval.kernels import plain
from rowint8.eval.kernels.chain import ChainBench
from rowint8.eval.models import MODELS
from rowint8.eval.results.schema import CHAIN_PRODUCTS
from rowint8.kernels.quantize import dequantize

SIZES = dict(qkv=(384, 128), o=(128, 128), gate_up=(512, 128), down=(128, 256))
"""The model "tiny"."""


def count(calls):
    """A capture whose time is the number of calls; the first is made."""
    calls[0]()
    return lambda: float(len(calls))


def rounded(part, weight):
    """A product that differs from bf16's as an 8-bit one does."""
    dense = dequantize(weight, torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, dense) * 1.01


def absent(part, weight):
    raise ImportError("No module named 'vllm'")


def wrong(part, weight):
    return lambda x: -rounded(part, weight)(x)


@pytest.fixture
def run(monkeypatch):
    """Rows of the model "tiny" on the CPU."""
    monkeypatch.setattr(kernel_peers, "load_vllm", lambda: False)
    made = dict(list(chains._MAKERS.items())[:3])
    made |= {name: (f"{name}'s", make) for name, make in dict(fp8=rounded, int8=wrong, machete=absent).items()}
    monkeypatch.setattr(chains, "_MAKERS", made)

    def rows(tokens, layers=3):
        said: list[str] = []
        return list(ChainBench(said.append, layers, "tiny", "cpu", count).rows(tokens)), said

    return rows


def test_rows_of_all_chains_beside_bf16(run):
    rows, said = run((1, 5))
    names = ("bf16", "rowint8", "rowint8-a8", "fp8")
    assert [(row.M, row.chain) for row in rows] == [(m, name) for m in (1, 5) for name in names]
    assert all((row.ratio is None) == (row.chain == "bf16") for row in rows)
    assert all((row.model, row.layers, row.us) == ("tiny", 3, 1.0) for row in rows)
    assert "without machete: ImportError: No module named 'vllm'" in said
    assert any(line.startswith("without int8: ValueError: it computes something else") for line in said)
    without_vllm = "; rowint8's add_rms_norm, torch.compile's SiLU and product"
    assert [row.kernels.endswith(without_vllm) for row in rows[:4]] == [True, False, False, True]


def test_each_kernel_is_timed_alone_over_all_layers(run):
    rows, _ = run((2,), layers=4)
    bf16, ours, ours_a8 = rows[:3]
    assert bf16.alone_us == dict.fromkeys([*CHAIN_PRODUCTS, "norm", "activation"], 4.0)
    for row in (ours, ours_a8):
        assert row.alone_us == dict.fromkeys([*CHAIN_PRODUCTS, "norm"], 4.0), "swiglu holds the activation"


def test_vllm_kernels_serve_the_other_chains_where_they_are_installed(run, monkeypatch):
    monkeypatch.setattr(kernel_peers, "load_vllm", lambda: True)
    monkeypatch.setattr(kernel_peers, "silu_and_mul", plain.silu_and_mul)

    def in_place(x, residual, weight, eps):
        normed, total = plain.add_rms_norm(x, residual, weight)
        return x.copy_(normed), residual.copy_(total)

    monkeypatch.setattr(kernel_peers, "add_rms_norm", in_place)
    rows, said = run((3,))
    assert [row.chain for row in rows] == ["bf16", "rowint8", "rowint8-a8", "fp8"]
    assert rows[0].kernels == "cuBLAS; vLLM's fused_add_rms_norm and silu_and_mul"
    assert len(said) == 2, "int8 and machete, as above"


def test_a_chain_computes_the_layers(run):
    bench = ChainBench(print, 2, "tiny", "cpu", count)
    weights = [{name: bench._weight(*size) for name, size in SIZES.items()} for _ in range(2)]
    x, residual = torch.randn(6, 128).bfloat16(), torch.randn(6, 128).bfloat16()
    expected, total = x.double(), residual.double()

    def norm(hidden, total):
        total = hidden + total
        return total / (total.pow(2).mean(-1, keepdim=True) + plain.EPS).sqrt(), total

    for each in weights:
        dense = {name: dequantize(weight).double() for name, weight in each.items()}
        normed, total = norm(expected, total)
        mixed = (normed @ dense["qkv"].T).reshape(-1)[: 6 * 128].view(6, 128)
        normed, total = norm(mixed @ dense["o"].T, total)
        gate, up = (normed @ dense["gate_up"].T).chunk(2, dim=-1)
        expected = (torch.nn.functional.silu(gate) * up) @ dense["down"].T
    small = bench._small_kernels()
    # Some twenty roundings to bf16, each of at most 0.004; with INT8 tokens 8 of about 0.01 besides.
    for name, within in (("bf16", 0.03), ("rowint8", 0.03), ("rowint8-a8", 0.06)):
        out = bench._made(name, weights, small).run(x, residual).double()
        assert (out - expected).norm() / expected.norm() < within, name


def test_weights_give_products_of_normed_tokens_a_deviation_of_1(run):
    weight = ChainBench(print, 1, "tiny", "cpu", count)._weight(256, 4096)
    assert dequantize(weight).std() * 4096**0.5 == pytest.approx(1, rel=0.01)
    assert MODELS["tiny"]["hidden_size"] == 128
