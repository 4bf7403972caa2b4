"""The small engine with INT8 activations: against transformers with rounded operands, its layers, what it refuses."""

import json

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from rowint8.baseline_engine import startup
from rowint8.baseline_engine.checkpoint import load_model
from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.layers import Int8Linear, WeightFormat
from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.eval.quantize.checkpoint import round_to_nearest, write_checkpoint
from rowint8.eval.quantize.source import open_source
from rowint8.kernels.activations import quantize_tokens, rotate, rotation_block
from rowint8.kernels.quantize import dequantize, quantize_rowwise
from tests.baseline_engine.harness import engine_for, load_transformers, prompt_logits, round_linears_, tokens_of
from tests.kernels.cases import round_experts_
from tests.tiny_models import prompts_of_ids, write_tiny

INT8 = {"quantization": "rowint8", "activations": "int8"}


def round_operands_(model) -> None:
    """Every decoder linear layer multiplies what INT8 holds of rotated rows and tokens, each rotated back."""
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            block = rotation_block(module.in_features)
            rows = quantize_rowwise(module.weight.data, block=block)
            module.weight.data = rotate(dequantize(rows), block)
            module.register_forward_pre_hook(lambda _, given, block=block: (rounded(given[0], block),))


def rounded(x, block):
    q, scale = quantize_tokens(x, block)
    return rotate(q.float() * scale[..., None], block)


def logits_of(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config])
def test_logits_equal_transformers_with_rounded_operands(tmp_path, family, fused):
    folder, ids = write_tiny(tmp_path, family, attention_bias=True), prompts_of_ids(20)[0]
    model, weights_only = load_transformers(folder), load_transformers(folder)
    round_operands_(model)
    round_linears_(weights_only)
    expected = logits_of(model, ids)
    engine = engine_for(folder, fused=fused, **INT8)
    off = (prompt_logits(engine, ids) - expected).norm()
    # a number near the middle of two integers may fall to the other side, so not every bit is the same
    assert off < 0.1 * (logits_of(weights_only, ids) - expected).norm()


def test_experts_take_int8_tokens_online_and_stored(tmp_path):
    shape = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 32}
    folder = write_tiny(tmp_path / "model", Qwen3MoeConfig, max_shard_size="1GB", **shape)
    ids = prompts_of_ids(20)[0]
    model, weights_only = load_transformers(folder), engine_for(folder, quantization="rowint8")
    round_operands_(model)
    round_experts_(model)
    engine, expected = engine_for(folder, **INT8), logits_of(model, ids)
    logits = prompt_logits(engine, ids)
    assert engine.model.layers[0].mlp.blocks() == (64, 16)
    assert (logits - expected).norm() < 0.1 * (prompt_logits(weights_only, ids) - expected).norm()
    source = open_source(folder)
    write_checkpoint(source, tmp_path / "int8", "rowint8", (), round_to_nearest(source.layers, 256), rotation=256)
    assert torch.equal(prompt_logits(engine_for(tmp_path / "int8"), ids), logits)


def test_a_card_that_takes_no_such_experts_leaves_the_model_weight_only_or_refuses_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(startup, "_obstacle", lambda *given: "the kernel for experts needs compute capability 9.0")
    folder = write_tiny(tmp_path)
    with caplog.at_level("WARNING"):
        assert engine_for(folder, **INT8).model.layers[0].attention.qkv.block is None
    reason = "the kernel for experts needs compute capability 9.0"
    assert caplog.messages == [f"activations are not rounded to INT8: {reason}"]
    with pytest.raises(EngineError, match=f"the checkpoint is for INT8 activations, and {reason}; give the original"):
        engine_for(edited_config(folder, activations="int8", rotation_block=256))


def test_a_model_speaks_as_before(smollm2):
    text, params = "The capital of France is", SamplingParams(max_tokens=8)
    plain, int8 = (engine_for(smollm2, dtype="bfloat16", **given).generate([text], params) for given in ({}, INT8))
    assert "Paris" in plain[0].text
    assert "Paris" in int8[0].text


def test_a_token_has_the_same_bits_alone_and_among_255_others(tmp_path):
    engine = engine_for(write_tiny(tmp_path), dtype="bfloat16", int8_lm_head=True, **INT8)
    x = torch.randn(256, 64).bfloat16()
    for layer in (engine.model.layers[0].mlp, engine.model.layers[1].attention.qkv, engine.model.lm_head):
        together = layer(x)
        for row in (0, 77, 255):
            assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_norms_hand_out_int8_where_they_are_one_operator_with_the_sum(tmp_path):
    engine, ids = engine_for(write_tiny(tmp_path), **INT8), prompts_of_ids(20)[0]
    plain = prompt_logits(engine, ids)
    calls = []
    for layer in engine.model.layers:
        for norm in (layer.input_norm, layer.post_norm):
            norm.fused = True  # as on a GPU
        layer.mlp.gate_up.register_forward_pre_hook(lambda _, given: calls.append(given[0]))
        layer.attention.qkv.register_forward_pre_hook(lambda _, given: calls.append(given[0]))
    engine.model.norm.fused = True
    assert (prompt_logits(engine, ids) - plain).norm() < 0.02 * plain.norm()
    assert [type(given).__name__ for given in calls] == ["Int8Tokens"] * len(engine.model.layers)


@pytest.mark.parametrize("tied", [True, False])
def test_an_int8_head_is_rotated_and_its_lookup_rotates_back(tmp_path, tied):
    folder, ids = write_tiny(tmp_path, tie_word_embeddings=tied), torch.arange(64)
    plain, int8 = engine_for(folder).model, engine_for(folder, int8_lm_head=True, **INT8).model
    assert int8.lm_head.block == 64
    assert (int8.embedding is int8.lm_head) == tied
    exact = plain.embedding.lookup(ids)
    assert (int8.embedding.lookup(ids) - exact).norm() <= 0.01 * exact.norm()
    hidden = torch.randn(9, 64)
    assert (int8.logits(hidden) - plain.logits(hidden)).norm() < 0.03 * plain.logits(hidden).norm()


def test_half_precision_rounds_once(tmp_path):
    folder = write_tiny(tmp_path)
    for dtype in ("bfloat16", "float16"):
        assert tokens_of(engine_for(folder, dtype=dtype, **INT8), prompts_of_ids(5), SamplingParams(max_tokens=4))


@pytest.mark.parametrize(("size", "said"), [(48, False), (44, True)])
def test_layers_that_cannot_be_rotated_are_named_once(tmp_path, caplog, size, said):
    with caplog.at_level("WARNING"):
        engine = engine_for(write_tiny(tmp_path, intermediate_size=size), **INT8)
    assert [f"layers with {size} inputs are not rotated" in line for line in caplog.messages] == [True] * said
    assert tokens_of(engine, prompts_of_ids(5), SamplingParams(max_tokens=4))


def test_compiled_layers_take_int8_activations(tmp_path):
    folder, params = write_tiny(tmp_path), SamplingParams(max_tokens=6)
    eager, compiled = (engine_for(folder, mode=mode, **INT8) for mode in ("eager", "compile"))
    assert tokens_of(compiled, prompts_of_ids(7, 12), params) == tokens_of(eager, prompts_of_ids(7, 12), params)


def test_the_kernels_of_a_step_are_made_before_the_first_request(tmp_path):
    from rowint8.baseline_engine.startup import _calls

    model = engine_for(write_tiny(tmp_path), **INT8).model
    for norm in (model.layers[0].post_norm, model.norm):
        norm.fused = True
    calls = {call[0] for call in _calls(model)}
    assert calls == {"quantize_tokens", "linear_int8", "swiglu_int8", "add_rms_norm_int8", "add_rms_norm"}


def edited_config(folder, **options):
    """Writes `quantization_config` of a rowint8 checkpoint."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "rowint8", **options}}
    path.write_text(json.dumps(config))
    return folder


BAD_CONFIGS = [
    {"activations": "fp8", "rotation_block": 256},
    {"activations": "int8", "rotation_block": 512},
    {"activations": "int8", "rotation_block": 8},
    {"activations": "int8", "rotation_block": True},
    {"activations": "int8", "rotation_block": "256"},
    {"activations": "int8", "serialized": False},
    {"rotation_block": 256},
    {"activations": ["int8"], "rotation_block": 256},
]


@pytest.mark.parametrize("options", BAD_CONFIGS, ids=str)
def test_a_checkpoint_that_says_something_else_is_refused(tmp_path, options):
    folder = edited_config(write_tiny(tmp_path), **options)
    with pytest.raises(EngineError, match="quantization_config has activations") as caught:
        ModelConfig.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_plain_rows_and_a_flag_disagree(tmp_path):
    with pytest.raises(EngineError, match="rows that are not rotated for it; give the original"):
        engine_for(edited_config(write_tiny(tmp_path)), activations="int8")


def test_activations_need_int8_weights(tmp_path):
    with pytest.raises(EngineError, match="INT8 activations are multiplied by INT8 weights; give quantization rowint8"):
        engine_for(write_tiny(tmp_path), activations="int8")
    with pytest.raises(EngineError, match="activations"):
        engine_for(write_tiny(tmp_path / "other"), quantization="rowint8", activations="fp8")


def test_weights_are_rotated_while_they_are_loaded(tmp_path):
    folder = write_tiny(tmp_path)
    weights = WeightFormat(torch.float32, torch.device("cpu"), int8=True, rotation=32)
    layer = load_model(folder, ModelConfig.from_folder(folder), weights).layers[0].attention.o
    assert isinstance(layer, Int8Linear)
    exact = load_transformers(folder).model.layers[0].self_attn.o_proj.weight.data
    expected = quantize_rowwise(exact, block=32)
    assert layer.block == 32
    assert torch.equal(layer.values, expected.values)
    assert torch.equal(layer.scale, expected.scale)
