"""Experts in INT8 inside the real engine (CPU build): tiny random models against transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Glm4MoeConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from rowint8.kernels.quantize import quantize_rowwise
from tests.vllm_plugin.harness import (
    PROMPTS,
    TINY,
    assert_follows,
    edited_copy,
    make_tiny,
    options,
    oracle,
    prequantized,
    with_other_numbers,
)
from tests.vllm_plugin.vllm_driver import describe

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from rowint8.vllm_plugin.moe import _scale_loader, why_unquantized

pytestmark = pytest.mark.vllm

SMALL = {"moe_intermediate_size": 96, "num_experts_per_tok": 2}
MODELS = {
    "qwen2-moe (a shared expert)": (
        Qwen2MoeConfig,
        {**SMALL, "num_experts": 6, "shared_expert_intermediate_size": 64},
    ),
    "glm4-moe (a router whose bias its experts hold too)": (
        Glm4MoeConfig,
        {**SMALL, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 32, "first_k_dense_replace": 0},
    ),
    "qwen3-moe (a router with a quant_config)": (Qwen3MoeConfig, {**SMALL, "num_experts": 5, "head_dim": 32}),
}
EXPERTS = "model.layers.1.block_sparse_moe.experts.routed_experts"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    return make_tiny(folder, MixtralConfig, num_local_experts=4, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def online(driver, mixtral) -> dict:
    return driver.works(mixtral)


def methods(result: dict) -> dict[str, str]:
    """Method by the layer's name within its block, of both layers, which must agree."""
    return {name.split(".", 3)[-1]: layer["method"] for name, layer in result["layers"].items()}


@pytest.mark.newest
def test_mixtral_says_what_the_dequantized_model_says(mixtral, online):
    model = oracle(mixtral)
    assert_follows(online, PROMPTS, lambda tokens: model(tokens).logits)


@pytest.mark.parametrize("case", MODELS)
def test_others_do_too(driver, tmp_path, case):
    config_class, shape = MODELS[case]
    folder = make_tiny(tmp_path / "model", config_class, **shape)
    result = driver.works(folder)
    assert methods(result)["mlp.experts.routed_experts"] == "RowInt8CpuMoEMethod"
    assert methods(result)["mlp.gate"] == "UnquantizedLinearMethod"
    model = oracle(folder)
    assert_follows(result, PROMPTS, lambda tokens: model(tokens).logits)


def test_experts_hold_the_bits_of_quantize_rowwise(mixtral, online):
    tensors = load_file(mixtral / "model.safetensors")

    def quantized(*parts):
        prefix = EXPERTS.removesuffix("routed_experts")
        experts = [torch.cat([tensors[f"{prefix}{e}.{part}.weight"] for part in parts]) for e in range(4)]
        values, scale = zip(*map(quantize_rowwise, experts), strict=True)
        return describe(torch.stack(values)), describe(torch.stack(scale))

    layer = online["layers"][EXPERTS]
    assert [layer["w13_weight"], layer["w13_weight_scale"]] == [*quantized("w1", "w3")]
    assert [layer["w2_weight"], layer["w2_weight_scale"]] == [*quantized("w2")]


def without_swiglu_calls(result: dict) -> dict:
    """Other weights, or none yet, route vLLM's profiling run to other experts: so many more or fewer of their calls."""
    return {key: value for key, value in result.items() if key != "swiglu_calls"}


def test_other_experts_are_reloaded_into_the_same_memory(driver, mixtral, online, tmp_path):
    result = driver.works(with_other_numbers(mixtral, tmp_path / "other"), reload=str(mixtral))
    assert result.pop("same_memory") is True
    assert without_swiglu_calls(result) == without_swiglu_calls(online)


def test_a_saved_sharded_state_is_the_same(driver, mixtral, online, tmp_path):
    result = driver.saves_and_loads(mixtral, tmp_path / "saved")
    assert without_swiglu_calls(result) == without_swiglu_calls(online)


def stored(source, folder, edit=lambda tensors: None):
    """The checkpoint with INT8 experts."""
    experts = tuple(name for name in load_file(source / "model.safetensors") if ".experts." in name)
    return prequantized(source, folder, edit, experts)


def test_stored_experts_equal_online_bit_for_bit(driver, mixtral, online, tmp_path):
    folder = stored(mixtral, tmp_path / "int8")
    result = driver.works(folder, llm={**TINY, "quantization": None}, reload=str(folder))
    assert result.pop("same_memory") is True
    assert without_swiglu_calls(result) == without_swiglu_calls(online)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_rows_of_an_experts_scales(rank):
    layer: Any = SimpleNamespace(
        moe_config=SimpleNamespace(tp_rank=rank), _map_global_expert_id_to_local_expert_id=lambda e: {7: 1}.get(e, -1)
    )
    load, scales = _scale_loader(layer), torch.arange(6.0).half()
    gate_up, down = torch.zeros(2, 6).half(), torch.zeros(2, 6).half()
    for shard, param in (("w1", gate_up), ("w3", gate_up), ("w2", down)):
        assert load(param, scales + 10 * int(shard[1]), "w_scale", shard, 7, return_success=True) is True
        assert load(param, scales, "w_scale", shard, 3, return_success=True) is False
    rows = torch.arange(3.0) + 3 * rank
    assert gate_up[1].tolist() == [*(rows + 10).tolist(), *(rows + 30).tolist()]
    assert down[1].tolist() == (scales + 20).tolist()
    assert not gate_up[0].any()


W1 = EXPERTS.replace("routed_experts", "2.w1.weight")
W1_SCALE = EXPERTS.replace("routed_experts", "2.w1.weight_scale")
W1_ROW = 2 * 2 * 160
"""The first of its rows among those of all experts."""
BAD_STORED = {
    "missing": (lambda t: t.pop(W1_SCALE), "w13_weight_scale: the checkpoint fills"),
    "NaN": (lambda t: t[W1_SCALE].__setitem__(5, float("nan")), f"w13_weight_scale: row {W1_ROW + 5} is nan, not a"),
    "zeros": (lambda t: t[W1_SCALE].zero_(), f"w13_weight_scale: row {W1_ROW} is 0.0, no scale of a row that is not"),
    "one scale": (
        lambda t: t.update({W1_SCALE: t[W1_SCALE][:1].clone()}),
        "w13_weight_scale: the checkpoint has shape [1], which does not fit",
    ),
    "turned": (
        lambda t: t.update({W1: t[W1].T.contiguous()}),
        "w13_weight: the checkpoint has shape [64, 160], which does not fit",
    ),
    "float": (lambda t: t.update({W1: t[W1].float()}), "w13_weight: the checkpoint has torch.float32, expected"),
}


@pytest.mark.parametrize("case", BAD_STORED)
def test_bad_stored_experts_are_refused(driver, mixtral, tmp_path, case):
    edit, message = BAD_STORED[case]
    assert message in driver.fails(stored(mixtral, tmp_path / "bad", edit))


def test_ignored_experts_stay_unquantized(driver, mixtral, online):
    result = driver.works(mixtral, llm=options(ignore=[EXPERTS.removesuffix(".routed_experts")]))
    changed = {name for name, layer in result["layers"].items() if layer != online["layers"][name]}
    assert changed == {EXPERTS}
    assert result["layers"][EXPERTS]["w13_weight"][0] == "torch.float32"


UNQUANTIZED = {
    "biases": (dict(moe_config=SimpleNamespace(has_bias=True)), "they have biases"),
    "activation": (dict(activation=MoEActivation.GELU), "their activation is gelu, not a plain SwiGLU"),
    "clamped activation": (dict(swiglu_limit=7.0), "their activation is silu, not a plain SwiGLU"),
    "inputs": (dict(apply_router_weight_on_input=True), "their inputs are weighted, not their outputs"),
}


@pytest.mark.parametrize("case", UNQUANTIZED)
def test_the_log_says_which_experts_are_not_done_in_int8(case):
    change, reason = UNQUANTIZED[case]
    swiglu = dict(activation=MoEActivation.SILU, swiglu_limit=None, apply_router_weight_on_input=False)
    layer = SimpleNamespace(**swiglu | {"moe_config": SimpleNamespace(has_bias=False)})
    assert why_unquantized(layer) is None
    assert why_unquantized(SimpleNamespace(**vars(layer) | change)) == reason


BAD = {
    "NaN": (lambda t: t[W1].__setitem__((3, 5), float("nan")), "w13_weight: row 643 holds NaN or Inf"),
    "missing": (lambda t: t.pop(W1), "w13_weight: the checkpoint fills 71680 of its 81920 numbers (found 7 parts)"),
    "narrow": (lambda t: t.update({W1: t[W1][:, :32].clone()}), "w13_weight: the checkpoint fills 76800 of its 81920"),
    "int8": (
        lambda t: t.update({W1: t[W1].to(torch.int8)}),
        "has torch.int8, expected torch.float32 or",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused(driver, mixtral, tmp_path, case):
    edit, message = BAD[case]
    assert message in driver.fails(edited_copy(mixtral, tmp_path / "bad", edit))
