"""`rowint8::add_rms_norm` as a provider of vLLM's operator. test_vllm_swiglu_fusion.py has it in a compiled engine."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm import ir
from vllm.config import CompilationMode

from rowint8.vllm_plugin import register
from rowint8.vllm_plugin.model import prepare_model
from rowint8.vllm_plugin.norm import PROVIDER


def implementation():
    register()
    register()  # changes nothing
    return ir.ops.fused_add_rms_norm.impls[PROVIDER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_what_vllm_does(dtype):
    draw = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, 24, generator=draw).to(dtype)
    weight = torch.randn(24, generator=draw).to(dtype)
    got = implementation().impl_fn(x, residual, weight, 1e-5)
    expected = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], expected[0], rtol=4 * ulp, atol=4 * ulp)  # it rounds the sum first


def test_what_it_does_not_know_is_left_to_vllm():
    x, weight = torch.ones(2, 8), torch.ones(8)
    supports = implementation().supports_args
    assert supports(x, x, weight, 1e-5)
    assert not supports(x, x, None, 1e-5)
    assert not supports(x, x, weight.double(), 1e-5)
    assert not supports(x, x.half(), weight, 1e-5)
    assert not supports(x, x[:1], weight, 1e-5)
    assert not supports(x, x, weight, 1e-5, 4)


@pytest.mark.parametrize("first", ["native", "vllm_c", PROVIDER])
@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.VLLM_COMPILE])
def test_it_comes_before_native_code_alone_and_in_compiled_models(monkeypatch, first, mode):
    order, chosen = [first, "native"], []
    priorities = SimpleNamespace(fused_add_rms_norm=order, rms_norm=order)
    config = SimpleNamespace(
        kernel_config=SimpleNamespace(ir_op_priority=priorities), compilation_config=SimpleNamespace(mode=mode)
    )
    monkeypatch.setattr(ir.ops.fused_add_rms_norm, "set_default", chosen.append)
    prepare_model(config, fuse_norm=True)
    if (first, mode) == ("native", CompilationMode.VLLM_COMPILE):
        assert priorities.fused_add_rms_norm == [PROVIDER, *order]
        assert chosen == [priorities.fused_add_rms_norm]
    else:
        assert (priorities.fused_add_rms_norm, chosen) == (order, [])
    assert priorities.rms_norm == [first, "native"]
