"""After `warmup` no launch compiles a kernel: recorded on cards that are not there, and run where there is one."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from rowint8.kernels import ops
from rowint8.kernels.warmup import Ready, WeightShape, warmup
from tests.conftest import REPO


@pytest.fixture(scope="module")
def cases():
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.record_warmup"]
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_number_of_tokens_needs_another_kernel(cases):
    within = [case for case in cases if not case.get("beyond")]
    assert len(within) == 11
    for case in within:
        assert case["missing"] == [], case["case"]
        assert case["warmed"] >= case["variants"] >= 6, case


def test_more_tokens_than_said_need_other_kernels(cases):
    beyond = [case for case in cases if case.get("beyond")]
    assert beyond
    assert all(case["missing"] for case in beyond)


def test_nothing_to_do_on_the_cpu():
    assert warmup([WeightShape("linear", 64, 64)], torch.bfloat16, torch.device("cpu"), 100) == Ready(0, 0.0)


@pytest.mark.gpu
def test_launches_after_it_compile_nothing():
    device, (n, k) = torch.device("cuda"), (1056, 1072)
    shapes = [WeightShape("linear", n, k, True), WeightShape("swiglu", n, k), WeightShape("add_rms_norm", n, n)]
    assert warmup(shapes, torch.float16, device, 2000).kernels > 3
    values = torch.zeros(n, k, dtype=torch.int8, device=device)
    scale, bias = torch.ones(2, n, dtype=torch.float16, device=device)
    compilations = []
    knobs.runtime.jit_cache_hook = lambda *, fn, **_: compilations.append(fn.name)
    try:
        for m in (1, 2, 16, 17, 2000, *random.sample(range(1, 2001), 100)):
            x = torch.ones(m, k, dtype=torch.float16, device=device)
            product = ops.linear(x, values, scale, bias)
            ops.add_rms_norm(product, product, bias, 1e-5)
            ops.swiglu(x, values, scale)
    finally:
        knobs.runtime.jit_cache_hook = None
    assert compilations == []


@pytest.mark.gpu
def test_on_a_card_the_hook_sees_a_compilation():
    """What the test above relies on: a shape that was not warmed up is compiled and recorded."""
    compilations = []
    knobs.runtime.jit_cache_hook = lambda *, fn, **_: compilations.append(fn.name)
    try:
        values = torch.zeros(48, 33, dtype=torch.int8, device="cuda")
        ops.linear(torch.ones(1, 33, device="cuda"), values, torch.ones(48, device="cuda").half())
    finally:
        knobs.runtime.jit_cache_hook = None
    assert compilations == ["one_token_kernel"]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("layer", "k_is_split", "applied"),
    [
        ({"bias": torch.ones(4), "skip_bias_add": False, "tp_rank": 1}, False, True),
        ({"bias": torch.ones(4), "skip_bias_add": False, "tp_rank": 0}, True, True),
        ({"bias": torch.ones(4), "skip_bias_add": False, "tp_rank": 1}, True, False),
        ({"bias": torch.ones(4), "skip_bias_add": True, "tp_rank": 0}, False, False),
        ({"bias": None, "skip_bias_add": False, "tp_rank": 0}, False, False),
        ({}, False, False),
    ],
)
def test_which_layers_of_vllm_add_their_bias_here(layer, k_is_split, applied):
    pytest.importorskip("vllm")
    from rowint8.vllm_plugin.warmup import applies_bias

    assert applies_bias(SimpleNamespace(**layer), k_is_split) == applied


@pytest.mark.vllm
def test_layers_of_one_shape_are_warmed_up_once(monkeypatch):
    pytest.importorskip("vllm")
    from rowint8.vllm_plugin.warmup import warm_up

    calls = []
    monkeypatch.setattr("rowint8.kernels.warmup.warmup", lambda *given: calls.append(given) or Ready(3, 0.5))
    weight = SimpleNamespace(shape=torch.Size([96, 32]), device=torch.device("cuda:7"))
    method = SimpleNamespace(is_gate_up=True, k_is_split=False, dtype=torch.bfloat16, max_tokens=2048, block=None)
    for bias in (torch.ones(96), torch.ones(96), None):
        warm_up(method, SimpleNamespace(weight=weight, bias=bias))
    swiglu = WeightShape("swiglu", 96, 32)
    assert calls == [
        ([WeightShape("linear", 96, 32, has_bias), swiglu], torch.bfloat16, torch.device("cuda:7"), 2048)
        for has_bias in (True, False)
    ]
    calls.clear()
    method.block = 16
    warm_up(method, SimpleNamespace(weight=weight, bias=None))
    rounded = [("linear_int8", 96, 32), ("swiglu_int8", 96, 32), ("quantize_tokens", 16, 32)]
    assert calls == [([WeightShape(*each) for each in rounded], torch.bfloat16, torch.device("cuda:7"), 2048)]
