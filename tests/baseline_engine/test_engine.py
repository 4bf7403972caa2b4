"""The whole engine against transformers, in every family, precision and weight format; settings."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.errors import EngineError
from rowint8.eval.quantize.checkpoint import round_to_nearest, write_checkpoint
from rowint8.eval.quantize.source import open_source
from rowint8.kernels.quantize import dequantize, quantize_rowwise
from tests.baseline_engine.harness import (
    engine_for,
    greedy_of_transformers,
    load_transformers,
    prompt_logits,
    round_linears_,
    tokens_of,
)
from tests.tiny_models import prompts_of_ids, write_tiny

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Water boils at",
]
MORE_TEXTS = [
    "In 1492 Columbus sailed across the ocean and",
    "import numpy as np\nx = np.",
    "The mitochondria is the powerhouse of the",
    "To be or not to be, that is the",
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ONE_KV_HEAD = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 1}
QWEN3_MOE = {"head_dim": 24, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
VARIANTS = {
    "Llama": (LlamaConfig, {}),
    "Llama with bias, untied, one kv head": (LlamaConfig, ONE_KV_HEAD),
    "Llama, head_dim not hidden / heads": (LlamaConfig, {"head_dim": 24}),
    "Llama without grouping": (LlamaConfig, {"num_key_value_heads": 4}),
    "Llama 3 rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "Mistral, window 8": (MistralConfig, {"sliding_window": 8, "head_dim": 16}),
    "Mistral without window": (MistralConfig, {"sliding_window": None, "tie_word_embeddings": False}),
    "Qwen2": (Qwen2Config, {}),
    "Qwen2, window 8": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "Qwen3": (Qwen3Config, {"head_dim": 24}),
    "Qwen3-MoE": (Qwen3MoeConfig, QWEN3_MOE),
    "Qwen3-MoE, shares that add up to 1": (Qwen3MoeConfig, QWEN3_MOE | {"norm_topk_prob": True}),
    "Mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "Qwen3 with bias, untied": (Qwen3Config, {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS.keys())
def test_greedy_equals_transformers_on_tiny_models(tmp_path, family, overrides):
    folder = write_tiny(tmp_path, family, **overrides)
    prompts = prompts_of_ids(1, 7, 30)
    model = load_transformers(folder)
    expected = [greedy_of_transformers(model, ids, 40) for ids in prompts]
    assert tokens_of(engine_for(folder), prompts, SamplingParams(max_tokens=40)) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3, "the prompts should not all lead to the same text"


def test_greedy_equals_transformers_on_smollm2(smollm2):
    engine = engine_for(smollm2)
    model = load_transformers(smollm2)
    expected = [greedy_of_transformers(model, engine.encode(text), 24) for text in TEXTS]
    assert tokens_of(engine, TEXTS, SamplingParams(max_tokens=24)) == expected


def test_int8_equals_transformers_with_rounded_weights_on_smollm2(smollm2):
    model = load_transformers(smollm2)
    round_linears_(model)
    engine = engine_for(smollm2, quantization="rowint8")
    ids = engine.encode(TEXTS[2])
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(prompt_logits(engine, ids), expected, rtol=1e-3, atol=1e-3)
    greedy = greedy_of_transformers(model, ids, 12)
    assert tokens_of(engine, [ids], SamplingParams(max_tokens=12)) == [greedy]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config])
def test_int8_equals_transformers_with_rounded_weights_on_a_tiny_model(tmp_path, family, fused):
    folder = write_tiny(tmp_path, family, attention_bias=True)
    model = load_transformers(folder)
    round_linears_(model)
    ids = prompts_of_ids(20)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    engine = engine_for(folder, quantization="rowint8", fused=fused)
    assert all(layer.mlp.fused is fused for layer in engine.model.layers)
    torch.testing.assert_close(prompt_logits(engine, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["Qwen3-MoE", "Mixtral"])
def test_int8_experts_equal_transformers_with_rounded_weights(tmp_path, case):
    family, overrides = VARIANTS[case]
    folder = write_tiny(tmp_path / "model", family, max_shard_size="1GB", **overrides)
    model = load_transformers(folder)
    round_linears_(model)
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for weight in module.parameters():
                weight.data = dequantize(quantize_rowwise(weight.data.flatten(0, 1))).view(weight.shape)
    ids = prompts_of_ids(20)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    online = engine_for(folder, quantization="rowint8")
    torch.testing.assert_close(prompt_logits(online, ids), expected, rtol=1e-4, atol=1e-4)
    source = open_source(folder)
    write_checkpoint(source, tmp_path / "int8", "rowint8", (), round_to_nearest(source.layers))
    stored = engine_for(tmp_path / "int8")
    torch.testing.assert_close(prompt_logits(stored, ids), expected, rtol=1e-4, atol=1e-4)


def test_int8_with_mlp_bias_runs_unfused_unless_asked(tmp_path):
    folder = write_tiny(tmp_path, mlp_bias=True)
    engine = engine_for(folder, quantization="rowint8")
    assert not any(layer.mlp.fused for layer in engine.model.layers)
    model = load_transformers(folder)
    round_linears_(model)
    ids = prompts_of_ids(9)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(prompt_logits(engine, ids), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(EngineError, match="bias"):
        engine_for(folder, quantization="rowint8", fused=True)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_lm_head_equals_transformers_with_a_rounded_head(tmp_path, tied):
    folder = write_tiny(tmp_path, tie_word_embeddings=tied)
    model = load_transformers(folder)
    round_linears_(model)
    rounded = torch.nn.Linear(64, 128, bias=False)
    rounded.weight.data = model.lm_head.weight.data.clone()
    wrapper = torch.nn.Module()
    wrapper.model = torch.nn.Sequential(rounded)
    round_linears_(wrapper)
    (model.model.embed_tokens if tied else model.lm_head).weight.data.copy_(rounded.weight.data)
    model.lm_head.weight.data.copy_(rounded.weight.data)
    ids = prompts_of_ids(20)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    plain = engine_for(folder, quantization="rowint8")
    engine = engine_for(folder, quantization="rowint8", int8_lm_head=True)
    torch.testing.assert_close(prompt_logits(engine, ids), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(prompt_logits(plain, ids), expected, rtol=1e-4, atol=1e-4)
    assert plain.model.weight_bytes - engine.model.weight_bytes == 128 * 64 * 3 - 128 * 2


def mean_error(close, exact) -> float:
    pairs = zip(close, exact, strict=True)
    return sum(float(torch.linalg.norm(a - b) / torch.linalg.norm(b)) for a, b in pairs) / len(exact)


def logits_of(folder, prompts, **settings) -> list:
    engine = engine_for(folder, **settings)
    return [prompt_logits(engine, ids) for ids in prompts]


@pytest.fixture(scope="module")
def in_fp32(smollm2):
    """Prompts, and what transformers and the engine (by quantization) say of them."""
    prompts = [engine_for(smollm2).encode(text) for text in TEXTS + MORE_TEXTS]
    ours = {name: logits_of(smollm2, prompts, quantization=name) for name in ("none", "rowint8")}
    model = load_transformers(smollm2)
    with torch.inference_mode():
        return prompts, [model(torch.tensor([ids])).logits[0] for ids in prompts], ours


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_no_more_than_transformers_does(smollm2, in_fp32, dtype):
    """The yardstick for rounding of activations is how far transformers itself moves from fp32 to that dtype.

    Rounding errors of one prompt vary by half from one correct implementation to another (transformers' own two kinds
    of attention, say), so they are compared as means over prompts.
    """
    prompts, exact, ours = in_fp32
    model = load_transformers(smollm2).to(getattr(torch, dtype))
    with torch.inference_mode():
        allowed = 1.25 * mean_error([model(torch.tensor([ids])).logits[0].float() for ids in prompts], exact)
    for quantization, fp32 in ours.items():
        assert mean_error(logits_of(smollm2, prompts, quantization=quantization, dtype=dtype), fp32) < allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int4"}, "quantization is 'int4'; it should be 'none' or 'rowint8'"),
        ({"mode": "fast"}, "mode is 'fast'; it should be 'auto', 'eager', 'compile' or 'graph'"),
        ({"mode": "graph"}, "mode is 'graph', which needs a CUDA GPU"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"fused": True}, "fused SwiGLU is an INT8 operator"),
        ({"int8_lm_head": True}, "int8_lm_head is part of rowint8; give quantization rowint8"),
        ({"device": "tpu"}, "device is 'tpu'; it should be 'auto', 'cpu' or 'cuda'"),
        ({"device": "meta"}, "device is 'meta'; it should be 'auto', 'cpu' or 'cuda'"),
        ({"device": "cuda:1"}, "device is 'cuda:1'; it should be 'auto', 'cpu' or 'cuda'"),
        ({"max_context": 1}, "max_context is 1; it should be greater than or equal to 2"),
        ({"cache_tokens": 1}, "cache_tokens is 1; it should be greater than or equal to 2"),
        ({"max_seqs": 0}, "max_seqs is 0; it should be greater than or equal to 1"),
        ({"prompt_graph_tokens": 2048}, "prompt_graph_tokens is 2048; it should be 0 or less than or equal to 1024"),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5; it should be less than or equal to 1"),
        ({"max_context": 200}, "max_context is 200; the model and the KV cache take up to 128"),
        ({"max_context": 100, "cache_tokens": 64}, "max_context is 100; the model and the KV cache take up to 64"),
        ({"cache_tokens": 10**15}, "no memory for a KV cache of 1000000000000016 tokens"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(EngineError, match=message) as caught:
        engine_for(write_tiny(tmp_path), **settings)
    assert "\n" not in str(caught.value)
