"""SwiGLU fusion: which graphs the pass rewrites. Fusions: that the compiled engine says the same with and without."""

import pytest
import torch
from torch.nn.functional import gelu, silu

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from rowint8.kernels import ops
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.vllm_plugin import swiglu_fusion
from rowint8.vllm_plugin.swiglu_fusion import SwigluFusion
from tests.vllm_plugin.harness import A8, FLIPS, TINY, Driver, assert_close, caches_in, make_tiny, options

I, K = 16, 24
WEIGHT = quantize_rowwise(torch.randn(2 * I, K, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module", autouse=True)
def vllms_kernels():
    """vLLM's compiled operators, which an engine has loaded before it compiles."""
    current_platform.import_kernels()


class Recorder(SwigluFusion):
    """The pass, which remembers the operators of the graph that it left."""

    def __call__(self, graph):
        super().__call__(graph)
        self.operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]


def compiled(function, x: torch.Tensor, recorder: Recorder | None = None) -> tuple[torch.Tensor, list[str]]:
    """The output of `function` compiled with the pass, and the operators that were left."""
    torch._dynamo.reset()
    recorder = recorder or Recorder(x.dtype, [(2 * I, K)])
    settings = {"post_grad_custom_post_pass": recorder, "enable_auto_functionalized_v2": False, "fx_graph_cache": False}
    return torch.compile(function, options=settings)(x), recorder.operators


def inputs(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def gate_up(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return ops.linear(x, *WEIGHT, bias)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return silu(x[..., :I]) * x[..., I:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_up_and_silu_and_mul_become_swiglu(dtype):
    x = inputs(dtype)
    out, operators = compiled(lambda x: silu_and_mul(gate_up(x)), x)
    assert operators == ["rowint8.swiglu.default"]
    torch.testing.assert_close(out, ops.swiglu(x, *WEIGHT), rtol=0, atol=0)


def test_vllms_own_silu_and_mul_becomes_swiglu():
    def mlp(x):
        out = x.new_empty(x.shape[0], I)
        torch.ops._C.silu_and_mul(out, gate_up(x))
        return out

    x = inputs()
    out, operators = compiled(mlp, x)
    assert operators[-1] == "rowint8.swiglu.default"
    assert "rowint8.linear.default" not in operators
    torch.testing.assert_close(out, ops.swiglu(x, *WEIGHT), rtol=0, atol=0)


UNLIKE = {
    "gelu": lambda x: gelu(gate_up(x)[..., :I]) * gate_up(x)[..., I:],
    "up before gate": lambda x: silu(gate_up(x)[..., I:]) * gate_up(x)[..., :I],
    "half of the halves": lambda x: silu(gate_up(x)[..., : I // 2]) * gate_up(x)[..., I // 2 : I],
    "bias": lambda x: silu_and_mul(gate_up(x, torch.ones(2 * I))),
    "something added, as by LoRA": lambda x: silu_and_mul(gate_up(x) + 1),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_is_not_a_swiglu_stays_as_it_is(case):
    x = inputs()
    out, operators = compiled(UNLIKE[case], x)
    assert "rowint8.linear.default" in operators
    assert "rowint8.swiglu.default" not in operators
    torch.testing.assert_close(out, UNLIKE[case](x))


def test_the_log_says_once_what_became_of_the_layers(monkeypatch):
    lines = []
    monkeypatch.setattr(swiglu_fusion.logger, "info", lambda text, *values: lines.append(text % values))
    function = {True: lambda x: silu_and_mul(gate_up(x)), False: UNLIKE["gelu"]}
    recorder = Recorder(torch.float32, [(2 * I, K)] * 30)
    for fusible in (True, True, False, False):
        compiled(function[fusible], inputs(), recorder)
    assert lines == [
        "rowint8: gate, up, SiLU and product are one kernel in the model's 30 gate_up layers",
        "rowint8: no SwiGLU kernel for gate_up layers that are not followed by SiLU and product alone",
    ]


def test_a_product_with_a_second_use_is_not_fused():
    def both(x):
        product = gate_up(x)
        return silu_and_mul(product) + product.sum()

    assert "rowint8.swiglu.default" not in compiled(both, inputs())[1]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """With compile caches of its own, so that the first engine compiles and the second may not take its graph."""
    folder = tmp_path_factory.mktemp("driver")
    driver = Driver(folder / "log", **caches_in(folder))
    yield driver
    driver.stop()


@pytest.mark.vllm
def test_the_compiled_engine_fuses_what_it_should_and_says_the_same(driver, tmp_path):
    tiny = make_tiny(tmp_path / "llama")
    eager = driver.works(tiny)
    assert eager["swiglu_calls"] == 0
    assert driver.log.read_text().count("SwiGLU not fused: the model is not compiled; norms not fused: the") == 1
    fused = driver.works(tiny, llm={**TINY, "enforce_eager": False})
    assert fused["swiglu_calls"] > 0
    assert fused["norm_calls"] > 0
    line = "rowint8: 14 linear layers in INT8, 0.00 -> 0.00 GiB; head float32; SwiGLU fused in 2 layers; norms fused"
    assert driver.log.read_text().count(line) == 1
    assert driver.log.read_text().count("one kernel in the model's 2 gate_up layers") == 1
    unfused = driver.works(tiny, llm={**options(fuse_swiglu=False, fuse_norm=False), "enforce_eager": False})
    assert (unfused["swiglu_calls"], unfused["norm_calls"]) == (0, 0)
    for result in (fused, unfused):
        assert result["token_ids"] == eager["token_ids"]
        assert_close(result["logprobs"], eager["logprobs"])
    again = driver.works(tiny, llm={**options(fuse_norm=False), "enforce_eager": False})
    assert again["swiglu_calls"] == fused["swiglu_calls"], "the compile cache mixed up the graphs"
    assert again["norm_calls"] == 0, "the compile cache mixed up the graphs"


@pytest.mark.newest
@pytest.mark.vllm
def test_with_int8_activations_it_rounds_in_the_norm_and_says_the_same(driver, tiny):
    eager = driver.works(tiny, llm=options(**A8))
    result = driver.works(tiny, llm={**options(**A8), "enforce_eager": False})
    calls = result["int8_calls"]
    assert calls["swiglu_int8"] > 0
    assert calls["add_rms_norm_int8"] > 0
    assert calls["quantize_tokens"] < calls["linear_int8"] + calls["swiglu_int8"]
    assert_close(result["prompt_logprobs"], eager["prompt_logprobs"], FLIPS)
    line = "in INT8, 0.00 -> 0.00 GiB; INT8 activations; head float32; SwiGLU fused in 2"
    assert line in driver.log.read_text()
