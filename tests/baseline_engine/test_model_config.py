"""config.json: what is read, what is refused."""

import json
import math

import pytest
import torch
from transformers import AutoConfig

from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.model_config import ModelConfig, RopeScaling

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(folder, generation=None, **changes):
    values = {key: value for key, value in (BASE | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_what_may_be_left_out(tmp_path):
    config = read(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (8, 8, 10000.0)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.rope_scaling) == (False, False, False, None)
    assert (config.qk_norm, config.sliding_window) == (False, None)
    assert config.dtype == torch.float32


def test_what_is_given_is_taken(tmp_path):
    config = read(tmp_path, num_key_value_heads=2, head_dim=16, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3)
    assert (config.num_kv_heads, config.head_dim, config.mlp_bias) == (2, 16, True)
    assert (config.qkv_bias, config.o_bias) == (True, True)
    assert config.rms_norm_eps == 1e-3


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_under_its_new_and_old_name(tmp_path, key):
    assert read(tmp_path, **{key: "bfloat16"}).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ],
    ids=["old names", "transformers 5"],
)
def test_rope_settings_under_their_old_and_new_names(tmp_path, settings):
    config = read(tmp_path, **settings)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(**LLAMA3)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [7, 2]}, (2, 7)),
        (2, {"eos_token_id": 9}, (2, 9)),
        (2, {}, (2,)),
    ],
)
def test_generation_config_adds_end_of_sequence_ids(tmp_path, eos, generation, expected):
    assert read(tmp_path, generation, eos_token_id=eos).eos_token_ids == expected


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("Mistral", {}, (False, False, False, 4096)),
        ("Mistral", {"sliding_window": 77}, (False, False, False, 77)),
        ("Qwen2", {"sliding_window": 77}, (True, False, False, None)),
        ("Qwen2", {"sliding_window": 77, "use_sliding_window": True}, (True, False, False, None)),
        (
            "Qwen2",
            {"sliding_window": 77, "use_sliding_window": True, "max_window_layers": 0},
            (True, False, False, 77),
        ),
        ("Qwen3", {"attention_bias": True}, (True, True, True, None)),
    ],
)
def test_what_tells_the_families_apart(tmp_path, family, changes, expected):
    config = read(tmp_path, architectures=[f"{family}ForCausalLM"], num_key_value_heads=8, **changes)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.sliding_window) == expected


def test_a_null_window_is_none(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(BASE | {"architectures": ["MistralForCausalLM"], "sliding_window": None})
    )
    assert ModelConfig.from_folder(tmp_path).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1}
            | {"num_key_value_heads": 8},
            "layers with and without sliding window",
        ),
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture MambaForCausalLM; the engine runs LlamaForCausalLM, MistralForCausalLM, Qwen2",
        ),
        ({"architectures": None}, "architecture none named"),
        ({"hidden_size": None, "vocab_size": None}, "missing vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it should be 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}},
            "rope scaling: rope_type is 'yarn'; it should be 'default' or 'llama3'",
        ),
        ({"num_key_value_heads": 3}, "query heads must be a multiple of key heads"),
        ({"head_dim": 7}, "even"),
        ({"dtype": "float64"}, "dtype is 'float64'; it should be 'float32', 'bfloat16' or 'float16'"),
        ({"hidden_size": "many"}, "hidden_size"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(tmp_path, changes, message):
    with pytest.raises(EngineError, match=message) as caught:
        read(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "holds a JSON list")])
def test_a_broken_file_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EngineError, match=f"config.json {message}"):
        ModelConfig.from_folder(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EngineError, match=r"config\.json is missing"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("family", "heads", "context", "head_dim", "eos"),
    [
        ("Llama", 32, 2048, 2, (2,)),
        ("Mistral", 8, 2**17, 2, (2,)),
        ("Qwen2", 32, 2**15, 2, ()),
        ("Qwen3", 32, 2**15, 128, ()),
        ("Qwen3Moe", 4, 2**15, 2, ()),
        ("Mixtral", 8, 2**17, 2, (2,)),
    ],
)
def test_what_is_left_out_is_what_transformers_has_for_the_family(tmp_path, family, heads, context, head_dim, eos):
    config = read(tmp_path, architectures=[f"{family}ForCausalLM"], num_attention_heads=32)
    assert (config.num_kv_heads, config.max_position_embeddings, config.head_dim) == (heads, context, head_dim)
    assert config.eos_token_ids == eos
    theirs = AutoConfig.for_model(family.lower().replace("moe", "_moe"), num_attention_heads=32, hidden_size=64)
    assert theirs.num_key_value_heads == heads
    assert theirs.max_position_embeddings == context
    assert getattr(theirs, "head_dim", None) in (head_dim, None)
    assert (theirs.eos_token_id,) * bool(eos) == eos


ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Llama", {"rope_parameters": ROPE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "differ; keep the"),
        ("Llama", {"rope_parameters": ROPE, "rope_scaling": {"rope_type": "default"}}, "differ; keep the"),
        ("Llama", {"rope_parameters": ROPE, "rope_theta": 10.0}, "rope_theta is both 10.0 and 500.0"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "default", "type": "llama3"}},
            "'default' and type 'llama3' differ",
        ),
        ("Llama", {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}, "full_attention is {"),
        ("Llama", {"rope_parameters": ROPE | {"factor": 2.0}}, "'default' with factor, which only 'llama3' has"),
        ("Llama", {"rope_parameters": ROPE | {"attention_factor": 2.0}}, "attention_factor is 2.0; the engine has no"),
        ("Llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 0}},
            "factor is 0; it should be greater",
        ),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 9.0}},
            "must be below its high",
        ),
        ("Llama", {"original_max_position_embeddings": 8}, "original_max_position_embeddings is 8"),
        *(("Llama", {"rope_theta": theta}, "rope_theta is ") for theta in (0, -1.0, math.nan, math.inf, "1e4", [1.0])),
        *(("Llama", {"rms_norm_eps": eps}, "rms_norm_eps is ") for eps in (-1e-6, math.nan, 2.0, "1e-6")),
        *(("Mistral", {"sliding_window": size}, "sliding_window is ") for size in (0, -1, 2.5, "8", 10**30)),
        *(("Qwen2", {"sliding_window": size}, "sliding_window is ") for size in (0, -1, 2.5)),
        ("Llama", {"sliding_window": 8}, "sliding_window is 8; it should be None"),
        ("Llama", {"layer_types": ["sliding_attention"] * 2}, "but sliding_window is null or off"),
        ("Mistral", {"layer_types": ["full_attention"] * 2}, "layer_types is "),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layers with and without sliding window"),
        ("Qwen3", {"layer_types": ["sliding_attention"] * 2}, "but sliding_window is null or off"),
        ("Qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 2 layers"),
        ("Qwen2", {"layer_types": ["linear_attention"] * 2}, "layer_types"),
        ("Mistral", {"attention_bias": True}, "attention_bias is True; it should be False"),
        ("Qwen2", {"mlp_bias": True}, "mlp_bias is True; it should be False"),
        ("Llama", {"eos_token_id": "2"}, "eos_token_id is '2'"),
        ("Llama", {"eos_token_id": [2, "3"]}, r"eos_token_id\[1\] is '3'|eos_token_id is \[2, '3'\]"),
        *(("Llama", {"num_hidden_layers": count}, "num_hidden_layers is ") for count in (0, -1, 2.0, "2", True, 10**6)),
        ("Llama", {"is_causal": False}, "is_causal is False"),
        ("Qwen3", {"text_config": {"hidden_size": 32}}, "text_config is "),
        ("Llama", {"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ("Qwen3", {"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ("Llama", {"model_type": 7}, "model_type is 7"),
        ("Llama", {"architectures": ["LlamaForCausalLM"] * 2}, "architecture LlamaForCausalLM, LlamaForCausalLM; the"),
        ("Llama", {"architectures": [["LlamaForCausalLM"]]}, "architecture \\['LlamaForCausalLM'\\]"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_the_file_says_and_the_engine_does_not_do_is_refused_by_name(tmp_path, family, changes, message):
    changes = {"architectures": [f"{family}ForCausalLM"], "num_key_value_heads": 8, "head_dim": 8, **changes}
    with pytest.raises(EngineError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(caught.value)
