"""Experts with INT8 activations: what a layer holds, what the real engine says (CPU build), and where they stay as they
are."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file
from transformers import MixtralConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from rowint8.vllm_plugin import compat, moe
from rowint8.vllm_plugin import config as config_module
from rowint8.vllm_plugin.config import RowInt8Config
from rowint8.vllm_plugin.linear import note_rotation, saved_blocks
from rowint8.vllm_plugin.moe_kernel import RowInt8Experts, experts_class
from tests.kernels.cases import rotated_experts, round_experts_
from tests.vllm_plugin import test_activations
from tests.vllm_plugin.harness import TINY, make_tiny, options, prequantized, with_other_numbers
from tests.vllm_plugin.test_activations import A8
from tests.vllm_plugin.vllm_driver import describe

EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    return make_tiny(folder, MixtralConfig, num_local_experts=4, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def rounded(driver, mixtral) -> dict:
    return driver.works(mixtral, llm=options(**A8))


@pytest.mark.vllm
def test_it_says_what_the_operators_say(mixtral, rounded):
    model = test_activations.oracle(mixtral)
    round_experts_(model)
    test_activations.assert_says(rounded, model)


@pytest.mark.vllm
def test_experts_hold_rotated_rows_and_their_blocks(mixtral, rounded):
    tensors = load_file(mixtral / "model.safetensors")
    names = {part: [f"{EXPERTS}.{e}.{part}.weight" for e in range(4)] for part in ("w1", "w2", "w3")}
    w1, w2, w3 = (torch.stack([tensors[name] for name in names[part]]) for part in ("w1", "w2", "w3"))
    w13_values, w13_scale, block = rotated_experts(torch.cat((w1, w3), 1))
    w2_values, w2_scale, hidden_block = rotated_experts(w2)
    assert (block, hidden_block) == (64, 32)
    assert rounded["layers"][f"{EXPERTS}.routed_experts"] == {
        "method": "RowInt8CpuMoEMethod",
        "w13_weight": describe(w13_values),
        "w13_weight_scale": describe(w13_scale),
        "w2_weight": describe(w2_values),
        "w2_weight_scale": describe(w2_scale),
        "rotation_block": describe(torch.tensor([[64, 32]] * 4, dtype=torch.int32)),
    }


@pytest.mark.vllm
def test_a_stored_checkpoint_a_reload_and_a_saved_state_are_the_same(driver, mixtral, rounded, tmp_path):
    experts = tuple(name for name in load_file(mixtral / "model.safetensors") if ".experts." in name)
    folder = prequantized(mixtral, tmp_path / "int8", also=experts, largest_block=256)
    other = with_other_numbers(mixtral, tmp_path / "other")
    results = [
        driver.works(folder, llm={**TINY, "quantization": None}),
        driver.works(other, llm=options(**A8), reload=str(mixtral)),
        driver.saves_and_loads(mixtral, tmp_path / "saved", llm=options(**A8)),
    ]
    assert results[1]["same_memory"]
    for result in results:
        assert result["layers"] == rounded["layers"]
        assert result["logprobs"] == rounded["logprobs"]
    plain = {**options(ignore=["re:.*_proj"]), "load_format": "sharded_state"}
    assert "rotation_block" in driver.fails(tmp_path / "saved", llm=plain)


def facts(**change) -> Any:
    """vLLM's facts of Qwen3-30B-A3B's experts on one GPU."""
    sizes = dict(hidden_dim=2048, intermediate_size_per_partition=768, tp_size=1, in_dtype=torch.bfloat16)
    return SimpleNamespace(**sizes | change)


def test_blocks_come_from_all_columns_and_a_part_that_cuts_them_is_refused():
    config = RowInt8Config(**A8)
    assert moe._rotation(facts(), "experts", config, False) == (256, 256)
    assert moe._rotation(facts(), "experts", RowInt8Config(), False) is None
    half = facts(tp_size=2, intermediate_size_per_partition=384)
    with pytest.raises(ValueError, match=r"model\.experts: a rank holds 384 of 768 columns, .* 256") as error:
        moe._rotation(half, "model.experts", config, False)
    assert str(error.value).endswith('take fewer ranks, or "rotation_block": 128')
    assert moe._rotation(half, "experts", RowInt8Config(rotation_block=128, **A8), False) == (128, 128)


@pytest.mark.parametrize("has_lora", [True, False])
def test_experts_that_cannot_stay_weight_only_and_say_so(monkeypatch, has_lora):
    lines = []
    monkeypatch.setattr(moe.logger, "warning_once", lines.append)
    monkeypatch.setattr(moe, "why_not_int8", lambda *given: "their kernel is for other cards")
    reason = "they may get LoRA adapters" if has_lora else "their kernel is for other cards"
    assert moe._rotation(facts(), "experts", RowInt8Config(**A8), has_lora) is None
    assert lines == [f"rowint8: activations of experts are not rounded to INT8: {reason}"]
    with pytest.raises(ValueError, match=f"model.experts: the checkpoint's experts are for INT8 .*, and {reason}"):
        moe._rotation(facts(), "model.experts", RowInt8Config(serialized=True, **A8), has_lora)


def test_vllm_can_move_experts_with_all_that_the_layer_holds():
    """EPLB takes every parameter apart by expert."""
    layer: Any = torch.nn.Module()
    layer.local_num_experts = 4
    moe._register_int8(layer, 4, 64, 32, None)
    note_rotation(layer, "experts", saved_blocks(*[(64, 32)] * 4), from_memory=False)
    assert [list(each.shape) for each in RoutedExperts.get_expert_weights(layer)][-1] == [4, 2]


def test_a_saved_state_of_other_blocks_is_refused():
    layer = torch.nn.Module()
    layer.register_parameter("rotation_block", saved_blocks((64, 64), (64, 64)))
    with pytest.raises(ValueError, match=r"experts: rows are rotated by \[64, 64\], not by \[64, 32\] as the options"):
        note_rotation(layer, "experts", saved_blocks((64, 32), (64, 32)), from_memory=True)


@pytest.mark.parametrize("blocks", [(64, 64), None])
def test_batch_invariance_takes_int8_experts_only_with_int8_activations(monkeypatch, blocks):
    lines = []
    layer = SimpleNamespace(activation=MoEActivation.SILU, swiglu_limit=None, apply_router_weight_on_input=False)
    layer.moe_config = SimpleNamespace(has_bias=False)
    monkeypatch.setattr(config_module.logger, "warning_once", lines.append)
    monkeypatch.setattr(compat, "batch_invariant", lambda: True)
    monkeypatch.setattr(moe, "make_experts_method", lambda *given: SimpleNamespace(blocks=blocks))
    method = RowInt8Config(**A8)._get_experts_method(layer, "model.experts")
    assert (method and method.blocks) == blocks
    assert len(lines) == (blocks is None)


def test_the_kernel_gets_the_rotation_and_leaves_nothing_to_vllm(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr("rowint8.kernels.experts.launch.experts", lambda *given, **more: calls.append(more))
    assert experts_class(None) is RowInt8Experts
    kernel = object.__new__(experts_class((256, 128)))
    kernel._lora_context, kernel.moe_config = None, SimpleNamespace()
    names = ("w1_scale", "w2_scale", "w1_bias", "w2_bias", "gemm1_alpha", "gemm1_clamp_limit")
    kernel.quant_config = SimpleNamespace(**dict.fromkeys(names))
    x, out, spaces = torch.ones(2, 16), torch.empty(2, 16), torch.empty(2, 64)
    tensors = out, x, None, None, torch.ones(2, 2), torch.zeros(2, 2), MoEActivation.SILU, 4, None, None, None
    kernel.apply(*tensors, *spaces, None, False)
    assert calls[0]["rotation"] == (256, 128)
    assert calls[0]["out"] is out
    kernel._lora_context = object()
    with pytest.raises(ValueError, match="these experts take INT8 activations alone, and experts have LoRA adapters"):
        kernel.apply(*tensors, *spaces, None, False)
