"""Sum and norm as one kernel: which graphs the pass rewrites. test_swiglu_fusion.py has it in a compiled engine."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from rowint8.vllm_plugin import compat
from rowint8.vllm_plugin.config import RowInt8Config
from rowint8.vllm_plugin.norm_fusion import NormFusion, supports
from rowint8.vllm_plugin.passes import Passes, prepare_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OURS = "rowint8.add_rms_norm.default"


class Recorder(NormFusion):
    """The pass, which remembers the operators of the graph that it left."""

    def __call__(self, graph):
        super().__call__(graph)
        self.operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]


def compiled(function, *given) -> tuple:
    """The output of `function` compiled with the pass, and the operators that were left."""
    torch._dynamo.reset()
    recorder = Recorder(given[0].dtype)
    settings = {"post_grad_custom_post_pass": recorder, "fx_graph_cache": False}
    return torch.compile(function, options=settings)(*given), recorder.operators


def by_ir(x, residual, weight):
    operator = compat.norm_operator()
    assert operator is not None
    return operator(x, residual, weight, 1e-5)


def by_torch(x, residual, weight):
    """vLLM's RMSNorm as it was before its IR, and is without one."""
    dtype = x.dtype
    x = x.to(torch.float32) + residual.to(torch.float32)
    residual = x.to(dtype)
    x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-5)
    return x.to(dtype) * weight, residual


def inputs(dtype) -> tuple:
    draw = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, 24, generator=draw).to(dtype)
    return x, residual, torch.randn(24, generator=draw).to(dtype)


FORMS = [by_torch] if compat.norm_operator() is None else [by_torch, by_ir]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_what_vllm_does(dtype, form):
    given = inputs(dtype)
    got, operators = compiled(form, *given)
    assert [name for name in operators if "getitem" not in name] == [OURS]
    expected = by_torch(*given)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], expected[0], rtol=4 * ulp, atol=4 * ulp)  # it rounds the sum first


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_norm_whose_sum_nobody_reads_is_fused_too(dtype):
    given = inputs(dtype)
    got, operators = compiled(lambda *given: by_torch(*given)[0], *given)
    assert OURS in operators
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(got, by_torch(*given)[0], rtol=4 * ulp, atol=4 * ulp)


UNLIKE = {
    "no weight": lambda x, residual, weight: by_torch(x, residual, 1.0),
    "one more than the weight, as in Gemma": lambda x, residual, weight: by_torch(x, residual, weight.float() + 1),
    "another residual shape": lambda x, residual, weight: by_torch(x, residual[:1], weight),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_is_not_this_norm_stays_as_it_is(case):
    given = inputs(torch.bfloat16)
    out, operators = compiled(UNLIKE[case], *given)
    assert OURS not in operators
    for got, expected in zip(out, UNLIKE[case](*given), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_what_it_does_not_know_is_left_to_vllm():
    x, weight = torch.ones(2, 8), torch.ones(8)

    def supported(x, residual, weight, *more):
        nodes = (
            tensor if tensor is None else SimpleNamespace(meta={"val": tensor}) for tensor in (x, residual, weight)
        )
        return supports(*nodes, *more)

    assert supported(x, x, weight, 1e-5)
    assert supported(x, x, weight, 1e-5, None)
    assert not supported(x, x, None, 1e-5)
    assert not supported(x, x, weight.double(), 1e-5)
    assert not supported(x, x.half(), weight, 1e-5)
    assert not supported(x, x[:1], weight, 1e-5)
    assert not supported(x, x, weight, 1e-5, 4)


@pytest.mark.parametrize("first", ["native", "vllm_c", None])
@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.VLLM_COMPILE])
def test_it_comes_before_native_code_alone_and_in_compiled_models(first, mode):
    """None: a vLLM that has no order of preference."""
    kernel_config = SimpleNamespace()
    if first:
        kernel_config.ir_op_priority = SimpleNamespace(fused_add_rms_norm=[first, "native"])
    compilation = SimpleNamespace(mode=mode, inductor_compile_config={})
    model = SimpleNamespace(dtype=torch.bfloat16, get_hidden_size=lambda: 64)
    config = SimpleNamespace(kernel_config=kernel_config, compilation_config=compilation, model_config=model)
    prepare_model(config, RowInt8Config())
    prepare_model(config, RowInt8Config())
    passes = compilation.inductor_compile_config.get(current_platform.pass_key)
    assert (isinstance(passes, Passes) and passes.norm is not None) == (
        first != "vllm_c" and mode == CompilationMode.VLLM_COMPILE
    )
    if first:
        assert kernel_config.ir_op_priority.fused_add_rms_norm == [first, "native"]
