"""The experts kernel as vLLM's modular kernels call it, interpreted: what it computes, and what it leaves to vLLM."""

from types import SimpleNamespace

import pytest
import torch
from triton import knobs

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from rowint8.kernels import reference
from rowint8.vllm_plugin import moe_kernel
from rowint8.vllm_plugin.moe_kernel import RowInt8Experts
from tests.kernels.test_experts import case

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="needs the interpreter")


@pytest.fixture
def apply():
    """Calls the kernel of a layer in memory that vLLM hands it, the output in the first workspace as there."""

    def call(x, layer, activation=MoEActivation.SILU, lora=None, weighted=False):
        kernel = object.__new__(RowInt8Experts)
        kernel._lora_context = lora
        kernel.moe_config = SimpleNamespace()
        kernel.quant_config = SimpleNamespace(
            w1_scale=layer.gate_up.scale,
            w2_scale=layer.down.scale,
            w1_bias=layer.gate_up_bias,
            w2_bias=layer.down_bias,
            gemm1_alpha=None,
            gemm1_clamp_limit=layer.limit,
        )
        workspaces = torch.full((2, len(x), layer.ids.shape[1], 96), float("nan"))
        output = workspaces[0].view(-1)[: x.numel()].view(x.shape)
        weights = layer.gate_up.values, layer.down.values, layer.weights, layer.ids
        kernel.apply(output, x, *weights, activation, 8, layer.expert_map, None, None, *workspaces, None, weighted)
        return output

    return call


@pytest.mark.parametrize("m", [1, 9])
def test_it_writes_what_the_oracle_says_for_the_experts_of_this_rank(apply, m):
    expert_map = torch.tensor([-1, 0, 1, -1, 2, -1, -1, -1], dtype=torch.int32)
    ids = torch.tensor([[1, 4], [0, 2], [3, 5]] * 3, dtype=torch.int32)[:m]
    x, layer = case(m, 2, 3, 48, 40, torch.float32, "cpu", ids=ids, expert_map=expert_map)
    assert torch.allclose(apply(x, layer).double(), reference.experts(x, *layer), atol=1e-4)


def test_gpt_oss_has_biases_and_a_clamped_activation(apply):
    biases = dict(gate_up_bias=torch.randn(3, 80) * 9, down_bias=torch.randn(3, 48))
    x, layer = case(5, 2, 3, 48, 40, torch.float32, "cpu", **biases)
    exact = reference.experts(x, *layer._replace(activation="swigluoai", limit=7.0))
    assert torch.allclose(apply(x, layer, MoEActivation.SWIGLUOAI).double(), exact, atol=1e-3)


LEFT_TO_VLLM = {
    "LoRA": (dict(lora=object()), "experts have LoRA adapters"),
    "activation": (dict(activation=MoEActivation.GELU), "their activation is gelu"),
    "inputs": (dict(weighted=True), "their inputs are weighted, not their outputs"),
}


@pytest.mark.parametrize("kind", LEFT_TO_VLLM)
def test_what_it_does_not_do_is_left_to_vllm_and_said_once(apply, monkeypatch, kind):
    change, reason = LEFT_TO_VLLM[kind]
    said: list[str] = []
    moe_kernel._say.cache_clear()
    monkeypatch.setattr(moe_kernel.logger, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.setattr(TritonExperts, "apply", lambda self, output, *given: output.fill_(float(len(given))))
    x, layer = case(2, 2, 3, 48, 40, torch.float32, "cpu")
    for _ in range(2):
        assert apply(x, layer, **change).eq(14).all()
    assert said == [f"rowint8: vLLM's Triton kernel computes the INT8 experts: {reason}"]
