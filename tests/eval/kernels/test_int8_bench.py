"""`rowint8 bench kernels --op linear_int8`: two rows a count, on rounded tokens and with their rounding."""

from functools import partial

import pytest
import torch
from torch.nn.functional import linear as dense_linear

from rowint8.eval.kernels import int8_bench, plain
from rowint8.eval.kernels import peers as kernel_peers
from rowint8.eval.kernels.int8_bench import Int8Bench, ours, rotated
from rowint8.eval.kernels.peers import RoundedProduct
from rowint8.eval.kernels.shapes import Shape
from rowint8.kernels.quantize import dequantize

GATE_UP = Shape("gate_up", 96, 64, ("linear", "swiglu"))


def count(calls):
    """A capture whose time is the number of calls; the first is made."""
    calls[0]()
    return lambda: float(len(calls))


def by_scale(weight, dtype, factor=1.0):
    """A peer that rounds to 8 bits by itself."""
    dense = dequantize(weight, dtype)
    return RoundedProduct(
        lambda x: (x / 2, x.new_full((1,), 2.0)), lambda x, scale: dense_linear(x, dense) * scale * factor
    )


@pytest.fixture
def run(monkeypatch):
    """Rows on the CPU with peers of our own; a time is the number of calls."""
    monkeypatch.setattr(kernel_peers, "load_vllm", lambda: False)
    monkeypatch.setattr(kernel_peers, "cutlass_int8", by_scale)
    monkeypatch.setattr(kernel_peers, "cutlass_fp8", partial(by_scale, factor=1.5))

    def rows(shapes, tokens):
        said: list[str] = []
        return list(Int8Bench(torch.bfloat16, said.append, "cpu", count).rows(shapes, tokens)), said

    return rows


def test_every_count_has_a_row_of_rounded_tokens_and_one_with_the_rounding(run):
    rows, said = run([GATE_UP], (1, 3))
    assert [(row.op, row.M) for row in rows] == [
        (f"{before}{op}", m)
        for op in ("linear_int8", "swiglu_int8")
        for m in (1, 3)
        for before in ("", "quantize_tokens+")
    ]
    for row in rows:
        assert set(row.us) == {"rowint8", "rowint8_weight_only", "cublas_bf16", "cutlass_int8"}
        assert set(row.paired) == set(row.us) - {"rowint8"}
        assert set(row.host_us) == {"rowint8", "cublas_bf16"}
    (line,) = said
    assert line.startswith("without cutlass_fp8: ValueError: it computes something else: relative difference 0.")


def test_what_is_called_rounds_in_one_row_and_not_in_the_other(run, monkeypatch):
    rounded = []
    quantize = int8_bench.ops.quantize_tokens
    monkeypatch.setattr(
        int8_bench.ops, "quantize_tokens", lambda x, block: rounded.append(len(x)) or quantize(x, block)
    )
    captured = []

    def capture(calls):
        before = len(rounded)
        calls[0]()
        captured.append(len(rounded) - before)
        return lambda: 1.0

    rows = list(Int8Bench(torch.bfloat16, print, "cpu", capture).rows([Shape("o", 32, 64)], (5,)))
    first = [list(row.us).index("rowint8") for row in rows]
    assert [row.op for row in rows] == ["linear_int8", "quantize_tokens+linear_int8"]
    assert (captured[first[0]], captured[len(rows[0].us) + first[1]]) == (0, 1)


@pytest.mark.parametrize("op", ["linear_int8", "swiglu_int8"])
def test_ours_computes_the_product_of_the_dense_weight(op):
    dense, x = torch.randn(96, 128) / 128**0.5, torch.randn(7, 128)
    exact = dense_linear(x, dense)
    exact = plain.silu_and_mul(exact) if op == "swiglu_int8" else exact
    out = ours(op, rotated(dense), torch.float32)(x)
    assert (out - exact).norm() / exact.norm() < 0.03, "two operands rounded to 8 bits, each by about 0.006"


def test_nothing_is_made_without_shapes(run, monkeypatch):
    monkeypatch.setattr(kernel_peers, "load_vllm", lambda: 1 / 0)
    assert run([], (1,)) == ([], [])
