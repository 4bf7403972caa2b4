"""Experts of a checkpoint in INT8: named alone or stacked, the bits of `quantize_rowwise`, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.checkpoint import block_of, round_to_nearest, write_checkpoint
from rowint8.eval.quantize.experts import layer_of
from rowint8.eval.quantize.layers import ignored_layers
from rowint8.eval.quantize.source import open_source
from rowint8.kernels.quantize import quantize_rowwise
from tests.tiny_models import write_tiny

EXPERTS = "model.layers.0.mlp.experts"
QWEN = {
    "max_shard_size": "1GB",
    "num_hidden_layers": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 32,
}


@pytest.fixture
def qwen(tmp_path):
    return write_tiny(tmp_path / "model", Qwen3MoeConfig, **QWEN)


def quantized(model, out, ignore=(), rotation=None):
    source = open_source(model)
    ignored = ignored_layers(source.layers, ignore)
    convert = round_to_nearest(source.layers - ignored, rotation)
    write_checkpoint(source, out, "rowint8", ignored, convert, rotation=rotation)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())["quantization_config"]


def edited(model, edit):
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def stack(tensors):
    """As some models have them."""
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        parts = {p: [tensors.pop(f"{block}.{e}.{p}_proj.weight") for e in range(3)] for p in ("gate", "up", "down")}
        gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors[f"{block}.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{block}.down_proj"] = torch.stack(parts["down"])


SHAPES = {
    "qwen3": (Qwen3MoeConfig, QWEN, "mlp.experts.2.gate_proj"),
    "mixtral": (
        MixtralConfig,
        {"max_shard_size": "1GB", "num_local_experts": 3, "num_experts_per_tok": 2},
        "block_sparse_moe.experts.2.w1",
    ),
    "deepseek-v3 (a dense layer, shared experts)": (
        DeepseekV3Config,
        dict(
            max_shard_size="1GB",
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=24,
        )
        | dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16),
        "mlp.experts.2.gate_proj",
    ),
}


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("case", SHAPES)
def test_every_experts_layer_holds_the_bits_of_quantize_rowwise(tmp_path, case, rotation):
    config, shape, name = SHAPES[case]
    model = write_tiny(tmp_path / "model", config, **shape)
    original, out = load_file(model / "model.safetensors"), tmp_path / "out"
    written, quantization = quantized(model, out, rotation=rotation)
    experts = [each for each in original if ".experts." in each]
    assert f"model.layers.1.{name}.weight" in experts
    for each in experts:
        values, scale = quantize_rowwise(original[each], block=block_of(original[each], rotation))
        assert torch.equal(written[each], values)
        assert torch.equal(written[f"{each}_scale"], scale)
    assert written["model.layers.1." + name.split(".")[0] + ".gate.weight"].is_floating_point()
    assert not any("experts." in entry for entry in quantization.get("ignore", []))


def test_stacked_experts_are_written_as_others_are(qwen, tmp_path):
    alone, _ = quantized(qwen, tmp_path / "alone")
    stacked, _ = quantized(edited(qwen, stack), tmp_path / "stacked")
    assert alone.keys() == stacked.keys()
    assert all(torch.equal(alone[name], stacked[name]) for name in alone)


def test_ignored_experts_are_named_as_a_layer(qwen, tmp_path):
    written, quantization = quantized(qwen, tmp_path / "out", [EXPERTS])
    assert quantization["ignore"] == [EXPERTS]
    assert written[f"{EXPERTS}.1.up_proj.weight"].is_floating_point()
    assert written[f"{EXPERTS.replace('0', '1')}.1.up_proj.weight"].dtype == torch.int8


def test_all_experts_of_a_layer_are_one():
    assert layer_of(f"{EXPERTS}.1.up_proj.weight") == EXPERTS
    assert layer_of("model.layers.0.mlp.shared_expert.up_proj.weight") == "model.layers.0.mlp.shared_expert.up_proj"


BAD = {
    "one is missing": (lambda t: t.pop(f"{EXPERTS}.1.up_proj.weight"), r"experts.gate_up_proj has shape \[2, 48, 64\]"),
    "one is short": (
        lambda t: t.update({f"{EXPERTS}.1.up_proj.weight": torch.ones(8, 64)}),
        r"experts.1.up_proj.weight has shape \[8, 64\]; other experts have \[24, 64\]",
    ),
    "another part": (
        lambda t: t.update({f"{EXPERTS}.1.up_proj.bias": torch.ones(24)}),
        r"experts.1.up_proj.bias is a part of experts that INT8 is not written for; vLLM quantizes",
    ),
    "columns first": (
        lambda t: (stack(t), t.update({f"{EXPERTS}.down_proj": t[f"{EXPERTS}.down_proj"].mT.contiguous()})),
        r"is not \[E, 2I, H\] or \[E, H, I\] beside the other",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_experts_that_do_not_fit_are_refused(qwen, bad):
    edit, message = BAD[bad]
    with pytest.raises(EvalError, match=message):
        open_source(edited(qwen, edit))


def test_gpt_oss_is_refused(tmp_path):
    model = write_tiny(tmp_path / "model", GptOssConfig, num_local_experts=3, num_experts_per_tok=2, head_dim=32)
    with pytest.raises(EvalError, match=r"a part of experts that INT8 is not written for|beside the other"):
        open_source(model)


def test_experts_have_one_format(qwen, tmp_path):
    source = open_source(qwen)
    with pytest.raises(EvalError, match="has experts, which are written in the format rowint8 alone"):
        write_checkpoint(source, tmp_path / "out", "compressed-tensors", (), round_to_nearest(source.layers))
