"""`rowint8 bench kernels`: what is timed computes the operators, and others that fail or dawdle do not stop a run."""

import importlib.util
import subprocess
import sys
import time

import pytest
import torch

from rowint8.eval.errors import EvalError
from rowint8.eval.kernels import peers as kernel_peers
from rowint8.eval.kernels import plain
from rowint8.eval.kernels.bench import KernelBench, is_timed
from rowint8.eval.kernels.plain import MODES, compile_logged
from rowint8.eval.kernels.rows import Budget, check_agrees
from rowint8.eval.kernels.shapes import (
    EVERY_COUNT,
    FEW_COUNTS,
    SHAPES,
    TOKENS,
    Shape,
    parse_ops,
    parse_tokens,
    select_shapes,
    shapes_with,
)
from rowint8.eval.kernels.timing import in_turns, paired_ratio
from rowint8.eval.models import DEFAULT_MODEL
from rowint8.eval.results.schema import Ratio
from rowint8.kernels import reference
from rowint8.kernels.quantize import Int8Weight, dequantize, quantize_rowwise

DTYPES = [torch.bfloat16, torch.float16]
GATE_UP = Shape("gate_up", 96, 64, ("linear", "swiglu"))
NORM = Shape("h64", 64, 64, ("add_rms_norm",))


def case(n, k, m, dtype):
    weight = quantize_rowwise(torch.randn(n, k) / k**0.5)
    return torch.randn(m, k).to(dtype), weight, Int8Weight(weight.values.abs(), weight.scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_linear_computes_the_operator(assert_matches, dtype):
    x, weight, absolute = case(130, 96, 7, dtype)
    exact = reference.linear(x, weight)
    rounded = [exact] * 2  # the product and the scale, besides the output
    assert_matches(plain.linear(x, *weight), exact, reference.linear(x.abs(), absolute), *rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_swiglu_computes_the_operator(assert_matches, dtype):
    x, weight, absolute = case(130, 96, 7, dtype)
    gate, up = reference.linear(x, weight).chunk(2, dim=-1)
    # Gate and up are rounded three times each and silu(gate) once; silu'(gate) * gate is at most 1.1 |gate|.
    rounded = [1.1 * gate * up] * 7
    gates, ups = reference.linear(x.abs(), absolute).chunk(2, dim=-1)
    assert_matches(plain.swiglu(x, *weight), reference.swiglu(x, weight), gates * ups, *rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_add_rms_norm_computes_the_operator(assert_matches, dtype):
    x, residual, weight = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.randn(96).to(dtype)
    normed, total = plain.add_rms_norm(x, residual, weight)
    exact, exact_total = reference.add_rms_norm(x, residual, weight, plain.EPS)
    assert_matches(total, exact_total, exact_total.abs())
    rounded = [exact] * 3  # the sum, which the mean shares, and the normalized row before its product
    assert_matches(normed, exact, exact.abs(), *rounded)


VLLM_KERNELS = """
import torch
from rowint8.eval.kernels import plain
from rowint8.eval.kernels import peers as peers
from rowint8.eval.kernels.rows import check_agrees
assert peers.load_vllm()
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
x, residual, weight = torch.randn(5, 96).bfloat16(), torch.randn(5, 96).bfloat16(), torch.randn(96).bfloat16()
normed, total = plain.add_rms_norm(x, residual, weight)
by_vllm = peers.add_rms_norm(x, residual, weight, plain.EPS)
check_agrees(by_vllm, normed), check_agrees(by_vllm[1], total)
gate_up = torch.randn(5, 64).bfloat16()
check_agrees(peers.silu_and_mul(gate_up), plain.silu_and_mul(gate_up))
print("agree")
"""


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_vllm_small_kernels_compute_the_same():
    done = subprocess.run([sys.executable, "-c", VLLM_KERNELS], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["agree"], done.stderr[-2000:]


def by_dense_product(weight, dtype):
    dense = dequantize(weight, dtype)
    return lambda x: torch.nn.functional.linear(x, dense)


def broken(weight, dtype):
    raise RuntimeError("no kernel\nfor this card")


def wrong(weight, dtype):
    return lambda x: by_dense_product(weight, dtype)(x) * 1.05


def once(weight, dtype):
    product, calls = by_dense_product(weight, dtype), iter([True])
    return lambda x: next(calls) and product(x)


def slow(weight, dtype):
    product = by_dense_product(weight, dtype)
    return lambda x: time.sleep(0.3) or product(x)


def count(calls):
    calls[0]()
    return lambda: float(len(calls))


@pytest.fixture
def run(monkeypatch):
    """Rows of a benchmark on the CPU with peers of our own; a time is the number of calls, and the first is made."""
    peers = dict(good=by_dense_product, broken=broken, wrong=wrong, once=once, slow=slow)
    monkeypatch.setattr(kernel_peers, "PEERS", peers)
    monkeypatch.setattr(kernel_peers, "load_vllm", lambda: False)
    ready_s = {"vllm": 60, "good": 60, "broken": 60, "wrong": 60, "once": 60, "slow": 0.5} | dict.fromkeys(MODES, 120)

    def rows(shapes, tokens, names=(), compiled=(), dtype=torch.bfloat16):
        said: list[str] = []
        bench = KernelBench(dtype, said.append, names, compiled, ready_s, "cpu", capture=count)
        return list(bench.rows(shapes, tokens)), said

    return rows


def test_rows_of_a_product_without_others(run):
    rows, said = run([GATE_UP, Shape("o", 32, 64)], (1, 3))
    assert [(row.op, row.shape, row.M, row.N, row.K) for row in rows] == [
        ("linear", "gate_up", 1, 96, 64),
        ("swiglu", "gate_up", 1, 96, 64),
        ("linear", "gate_up", 3, 96, 64),
        ("swiglu", "gate_up", 3, 96, 64),
        ("linear", "o", 1, 32, 64),
        ("linear", "o", 3, 32, 64),
    ]
    assert set(rows[0].us) == {"rowint8", "cublas_bf16"}
    assert set(rows[1].us) == {"rowint8", "cublas_bf16", "unfused"}
    assert all(set(row.host_us) == {"rowint8", "cublas_bf16"} for row in rows)
    assert rows[0].us["rowint8"] == 128, "small weights rotate over 128 copies"
    assert rows[0].paired == {"cublas_bf16": Ratio(value=1.0, low=1.0, high=1.0)}
    assert set(rows[1].paired) == {"cublas_bf16", "unfused"}
    assert rows[0].sm_mhz is None or torch.cuda.is_available()
    assert all(row.compiler is None and row.dtype == "bfloat16" for row in rows)
    assert said == []


def test_fp16_rows_say_so(run):
    (row,), _ = run([Shape("o", 32, 64)], (2,), dtype=torch.float16)
    assert row.dtype == "float16"
    assert set(row.us) == {"rowint8", "cublas_fp16"}


def test_others_that_fail_or_are_wrong_or_too_slow_are_left_out_and_named(run):
    rows, said = run([Shape("o", 32, 64)], (1, 2, 3, 4), ["good", "broken", "wrong", "once", "slow"])
    timed = [set(row.us) - {"rowint8", "cublas_bf16"} for row in rows]
    assert timed == [{"good", "slow"}, {"good", "slow"}, {"good"}, {"good"}]
    assert any(line.startswith("good: packed 128 copies of o in ") for line in said)
    assert "without broken: RuntimeError: no kernel" in said
    assert "without once: StopIteration: " in said, "it computes the product, but fails while it is timed"
    assert any(line.startswith("without wrong: ValueError: it computes something else: relative") for line in said)
    assert sum(line.startswith("from here without slow: it has taken ") for line in said) == 1


def test_vllm_kernels_stand_beside_ours_where_they_are_installed(run, monkeypatch):
    monkeypatch.setattr(kernel_peers, "load_vllm", lambda: True)
    monkeypatch.setattr(kernel_peers, "silu_and_mul", plain.silu_and_mul)
    monkeypatch.setattr(
        kernel_peers, "add_rms_norm", lambda x, residual, weight, eps: plain.add_rms_norm(x, residual, weight)
    )
    rows, _ = run([GATE_UP, NORM], (2,), ["good"])
    assert set(rows[1].us) == {"rowint8", "cublas_bf16", "unfused", "cublas_bf16_vllm", "unfused_vllm", "good_vllm"}
    assert {"rowint8", "vllm"} < set(rows[2].us)


def test_torch_compile_stands_beside_eager(run):
    rows, said = run([GATE_UP, NORM], (2,), compiled=["compiled"])
    assert said == []
    linear, swiglu, norm = rows
    for row in rows:
        assert {"rowint8", "eager", "compiled"} <= set(row.us)
    assert linear.compiler["compiled"].extern == swiglu.compiler["compiled"].extern == ("extern_kernels.mm",)
    assert len(swiglu.compiler["compiled"].kernels) == 2, "widening the weight, and all that follows the product"
    assert norm.compiler["compiled"].extern == ()
    assert (norm.N, norm.K) == (64, 64)


def test_compilation_log_names_nodes_and_what_was_not_fused(capfd):
    x, weight, _ = case(64, 96, 5, torch.float32)
    torch._dynamo.reset()
    compiled, out, fact = compile_logged(plain.swiglu, (x, *weight), "default")
    torch.testing.assert_close(out, plain.swiglu(x, *weight))
    torch.testing.assert_close(compiled(x, *weight), out)
    assert any("ExternKernelSchedulerNode" in line for line in fact.log)
    assert any(line.startswith("completed fusion round") for line in fact.log)
    assert all("stack_traces" not in line for line in fact.log)
    assert "SchedulerNode" not in capfd.readouterr().err


def test_check_agrees_allows_rounding_only():
    out = torch.randn(100)
    assert check_agrees((out * 1.01, "other"), (out, "ignored"))
    for bad in (out * 1.03, torch.full_like(out, float("nan"))):
        with pytest.raises(ValueError, match="computes something else"):
            check_agrees(bad, out)


def test_budget_counts_over_calls_and_keeps_the_last_result():
    said: list[str] = []
    budget = Budget({"a": 0.05, "b": 1}, said.append)
    assert budget.run("a", lambda: 1) == 1
    assert said == []
    assert budget.run("a", lambda: time.sleep(0.06) or 2) == 2
    assert said == ["from here without a: it has taken 0 s, of 0 s allowed"]
    assert budget.run("a", lambda: 3) is None
    assert budget.attempt("a", lambda: 3) == 3
    assert budget.left_s("a") == 0
    assert budget.run("b", lambda: 4) == 4
    assert 0.9 < budget.left_s("b") <= 1


def test_budget_does_not_hide_an_interruption():
    with pytest.raises(KeyboardInterrupt):
        Budget({"a": 1}, print).run("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_gemlite_is_tuned_once_for_neighbouring_tokens():
    assert [kernel_peers.gemlite_bucket(m) for m in (1, 2, 3, 16, 17, 32)] == [1, 2, 16, 16, 32, 32]
    assert kernel_peers.gemlite_bucket(33) == kernel_peers.gemlite_bucket(8192) > 32


def test_gemlite_is_compiled_apart_for_the_first_of_each_bucket_and_stopped_in_time(monkeypatch):
    started: list[tuple] = []

    def sleep(function, request, env, timeout):
        assert function is kernel_peers.tune_gemlite
        started.append(tuple(request[name] for name in ("n", "k", "m", "dtype")))
        time.sleep(timeout)
        raise EvalError("it did not answer in time")

    monkeypatch.setattr(kernel_peers, "_gemlite_helper", lambda: None)
    monkeypatch.setattr(kernel_peers, "run_worker", sleep)
    monkeypatch.setattr(kernel_peers.os, "cpu_count", lambda: 4)
    start = time.monotonic()
    assert kernel_peers.gemlite_ahead([(32, 64)], (4, 8, 16, 64, 128), torch.float16, seconds=0.3)
    assert time.monotonic() - start < 2
    assert sorted(started) == [(32, 64, 4, "float16"), (32, 64, 64, "float16")]
    kernel_peers.gemlite_ahead([(32, 64)], (1,), torch.float16, seconds=0)
    assert len(started) == 2, "nothing starts without time left"


def test_candidates_take_turns_and_the_order_alternates():
    order = []
    replays = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    times = in_turns(replays, rounds=3)
    assert "".join(order) == "abccbaabccba"
    assert times == {"a": [6.0, 7.0, 12.0], "b": [5.0, 8.0, 11.0], "c": [4.0, 9.0, 10.0]}


def test_the_paired_ratio_is_a_median_between_ranks_that_cover_it():
    others = [10.0 * (1 + i % 3) for i in range(12)]
    ours = [other * (1 + i / 100) for i, other in enumerate(others)]
    found = paired_ratio(ours, others)
    assert found.value == pytest.approx(1.055), "drift that both share cancels"
    assert (found.low, found.high) == (pytest.approx(1.02), pytest.approx(1.09)), "the third and the tenth of 12"
    few = paired_ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert (few.low, few.value, few.high) == (1.0, 2.0, 4.0)


@pytest.mark.parametrize("rounds", [6, 9, 12])
def test_the_interval_holds_the_median_as_often_as_it_says(rounds):
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(4000, rounds, generator=generator) ** 3 + 0.1  # skewed; its median is that of the uniform
    median = 0.5**3 + 0.1
    found = [paired_ratio(sample, [1.0] * rounds) for sample in samples.tolist()]
    share = sum(ratio.low <= median <= ratio.high for ratio in found) / len(found)
    assert 0.94 < share < 0.985


def test_every_count_has_all_small_ones_and_the_remainders():
    assert set(range(1, 33)) | set(TOKENS) < set(EVERY_COUNT)
    assert list(EVERY_COUNT) == sorted(set(EVERY_COUNT))
    remainders = {m % 64 for m in EVERY_COUNT if m > 64}
    assert {0, 1, 8, 16, 32, 48} <= remainders, "of a tile of 64 tokens"
    assert set(FEW_COUNTS) < set(EVERY_COUNT)


def test_peers_that_tune_for_minutes_are_timed_at_few_counts_of_one_model():
    llama, qwen = SHAPES["gate_up"][0], SHAPES["qwen2.5-7b/gate_up"][0]
    for peer in ("gemlite", "humming"):
        assert [m for m in EVERY_COUNT if is_timed(peer, llama, m)] == list(FEW_COUNTS)
        assert not any(is_timed(peer, qwen, m) for m in EVERY_COUNT)
    assert all(is_timed("marlin", shape, m) for shape in (llama, qwen) for m in EVERY_COUNT)


def test_a_norm_is_compiled_once_for_all_counts(run):
    rows, said = run([NORM], (1, 2, 5, 40))
    assert said == []
    assert all({"rowint8", "eager", "compiled"} == set(row.us) for row in rows)
    assert all(row.compiler is None for row in rows), "what was generated is told where it was asked for"


def test_shapes_are_those_of_the_models():
    assert [(shape.name, shape.n, shape.k) for shape in SHAPES[DEFAULT_MODEL]] == [
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate_up", 28672, 4096),
        ("down", 4096, 14336),
        ("h4096", 4096, 4096),
    ]
    assert [shape[1:3] for shape in SHAPES["lm_head"]] == [(128256, 4096)]
    for name, layer in SHAPES.items():
        if len(layer) > 1:
            qkv, o, gate_up, down, *norms = layer
            assert qkv.k == gate_up.k == down.n == o.n
            assert gate_up.n == 2 * down.k
            gated = name == "gemma-2-9b"
            assert gate_up.ops == (("linear",) if gated else ("linear", "swiglu"))
            assert [(norm.n, norm.ops) for norm in norms] == ([] if gated else [(o.n, ("add_rms_norm",))])
    sizes = {name: [shape[1:3] for shape in SHAPES[name][:4]] for name in ("qwen2.5-7b", "gemma-2-9b")}
    assert sizes["qwen2.5-7b"] == [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]
    assert sizes["gemma-2-9b"] == [(8192, 3584), (3584, 4096), (28672, 3584), (3584, 14336)]
    assert all(shape.name == name for name, (shape, *rest) in SHAPES.items() if not rest)


def test_shapes_are_chosen_by_model_or_name_once_each():
    chosen = select_shapes("gate_up,qwen2.5-0.5b/qkv,llama-3.1-8b")
    assert [shape.name for shape in chosen] == ["gate_up", "qwen2.5-0.5b/qkv", "qkv", "o", "down", "h4096"]
    with pytest.raises(EvalError, match=r"--shapes has ff, ; accepted are llama-3\.1-8b, .*gate_up"):
        select_shapes("o,ff,")


def test_operators_are_chosen_by_name_and_shapes_without_them_are_left_out():
    assert parse_ops("swiglu,linear_int8") == ["swiglu", "linear_int8"]
    with pytest.raises(EvalError, match=r"--op has ff; accepted are linear, swiglu, add_rms_norm, linear_int8, swig"):
        parse_ops("linear,ff")
    kept = shapes_with(SHAPES[DEFAULT_MODEL], lambda op: op == "swiglu")
    assert [(shape.name, shape.ops) for shape in kept] == [("gate_up", ("swiglu",))]


def test_rows_of_one_operator_of_a_shape(run):
    rows, _ = run([Shape("gate_up", 96, 64, ("swiglu",))], (2,))
    assert [row.op for row in rows] == ["swiglu"]


def test_tokens_are_whole_numbers_above_zero():
    assert parse_tokens("1,16,8") == (1, 16, 8)
    with pytest.raises(EvalError, match=r"--tokens has '0', '-1', '', '²', '1\.5'; give whole numbers above 0"):
        parse_tokens("0,-1,,²,1.5,2")
