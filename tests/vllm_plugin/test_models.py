"""Models beyond Llama as vLLM defines them, and LoRA over INT8 layers: tiny random models against transformers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import GemmaConfig, MistralConfig, Phi3Config, PhiConfig, Qwen3Config

from tests.vllm_plugin.harness import PROMPTS, SAMPLING, TINY, assert_follows, make_tiny, oracle

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WITHOUT_PROMPT = {**SAMPLING, "prompt_logprobs": None}  # which vLLM cannot compute with LoRA on the CPU
RANK, ALPHA = 8, 16
TARGETS = {"q_proj": (64, 64), "gate_proj": (160, 64), "down_proj": (64, 160)}
LIKE_PHI_2 = {"intermediate_size": 4 * 64, "num_key_value_heads": 2}
"""The only shape that vLLM 0.26 knows for Phi."""

MODELS = {
    "qwen3 (norms on q and k)": (Qwen3Config, {"head_dim": 32}),
    "mistral (sliding window)": (MistralConfig, {"head_dim": 32, "sliding_window": 8}),
    "gemma (GELU, tied)": (GemmaConfig, {"head_dim": 32, "tie_word_embeddings": True}),
    "phi (no gate, biases everywhere)": (PhiConfig, LIKE_PHI_2),
    "phi3 (merged in the checkpoint)": (Phi3Config, {"pad_token_id": 0}),
}


@pytest.mark.parametrize("case", MODELS)
def test_it_says_what_the_dequantized_model_says(driver, tmp_path, case):
    config_class, shape = MODELS[case]
    folder = make_tiny(tmp_path / "model", config_class, **shape)
    result = driver.works(folder)
    dtypes = {layer["weight"][0] for layer in result["layers"].values() if layer["method"] == "RowInt8LinearMethod"}
    assert dtypes == {"torch.int8"}
    model = oracle(folder)
    assert_follows(result, PROMPTS, lambda tokens: model(tokens).logits)


def make_adapter(folder):
    """A LoRA adapter of the first layer with random A and B."""
    tensors = {}
    for name, (n, k) in TARGETS.items():
        block = "self_attn" if name == "q_proj" else "mlp"
        prefix = f"base_model.model.model.layers.0.{block}.{name}"
        tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(RANK, k)
        tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(n, RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_lora_over_int8_layers(driver, tmp_path):
    folder = make_tiny(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter")
    llm = {**TINY, "enable_lora": True, "max_lora_rank": RANK, "enforce_eager": False}
    result = driver.works(folder, llm=llm, sampling=WITHOUT_PROMPT, lora=str(tmp_path / "adapter"))
    plain = oracle(folder)
    with pytest.raises(AssertionError):
        assert_follows(result, PROMPTS, lambda tokens: plain(tokens).logits)
    model = oracle(folder)
    for name, lora_b in adapter.items():
        if name.endswith("lora_B.weight"):
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
            layer.weight.data += ALPHA / RANK * lora_b @ adapter[name.replace("lora_B", "lora_A")]
    assert_follows(result, PROMPTS, lambda tokens: model(tokens).logits)
    assert result["swiglu_calls"] == 0
