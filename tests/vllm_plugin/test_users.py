"""What users combine with INT8 weights in the real engine (CPU build).

Pipeline parallelism and vision towers take too long for CI: docs/vllm.md says what was run.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rowint8.kernels.quantize import Int8Weight, dequantize, quantize_rowwise
from tests.vllm_plugin.harness import (
    PROMPTS,
    SAMPLING,
    TINY,
    Driver,
    assert_close,
    assert_follows,
    make_tiny,
    options,
    oracle,
)
from tests.vllm_plugin.vllm_driver import describe

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

GENERATED = SAMPLING | {"prompt_logprobs": None}
"""vLLM gives no log-probabilities of the prompt beside speculation."""


@pytest.fixture
def speculating(tmp_path):
    """A process of its own: once speculation is set up in it, vLLM's CPU build runs no other engine."""
    driver = Driver(tmp_path / "log")
    yield driver
    driver.stop()


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    """A random EAGLE drafter of one layer for `tiny`, which takes the target's embedding and head."""
    folder = make_tiny(tmp_path_factory.mktemp("eagle") / "eagle", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    layers = {name.removeprefix("model."): tensors[name] for name in tensors if ".layers." in name}
    drafter = {name: tensor for name, tensor in layers.items() if "input_layernorm" not in name}
    save_file(drafter | {"fc.weight": torch.randn(64, 128)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_eagle_drafter_beside_an_int8_target_changes_no_token(speculating, eagle, tiny, online):
    speculation = {"method": "eagle", "model": str(eagle), "num_speculative_tokens": 2}
    llm = {**options(lm_head=False), "speculative_config": speculation}
    result = speculating.works(tiny, sampling=GENERATED, llm=llm)
    assert result["token_ids"] == online["token_ids"]
    assert_close(result["logprobs"], online["logprobs"])


def test_the_embedding_alone_becomes_int8(driver, tiny, online):
    result = driver.works(tiny, llm=options(embed_tokens=True))
    values, scale = quantize_rowwise(load_file(tiny / "model.safetensors")["model.embed_tokens.weight"])
    stored = {"weight": describe(values), "weight_scale": describe(scale)}
    assert result["layers"]["model.embed_tokens"] == {"method": "RowInt8EmbeddingMethod", **stored}
    assert result["layers"]["lm_head"] == online["layers"]["lm_head"]
    model = oracle(tiny)
    model.model.embed_tokens.weight.data = dequantize(Int8Weight(values, scale))
    assert_follows(result, PROMPTS, lambda tokens: model(tokens).logits)


def test_a_classifier_keeps_its_last_layer(driver, tmp_path):
    folder = make_classifier(tmp_path / "classifier")
    result = driver.works(folder, classify=True)
    assert result["layers"]["score"]["weight"][0] == "torch.float32"
    assert result["layers"]["model.layers.0.mlp.down_proj"]["weight"][0] == "torch.int8"
    model = oracle(folder, model_class=AutoModelForSequenceClassification)
    for prompt, probabilities in zip(PROMPTS, result["probabilities"], strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(probabilities), expected, rtol=0, atol=2e-4)


def make_classifier(folder):
    """A random Llama whose last layer tells three classes apart."""
    make_tiny(folder, LlamaConfig, num_labels=3, pad_token_id=0)
    config = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    torch.nn.init.normal_(config.score.weight)
    config.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    return folder


def test_ngram_speculation_over_an_fp8_cache_follows_the_same_model(speculating, driver, tiny, online):
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = {**TINY, "kv_cache_dtype": "fp8"}
    plain = driver.works(tiny, sampling=GENERATED, llm=llm)
    guessed = speculating.works(tiny, sampling=GENERATED, llm={**llm, "speculative_config": speculation})
    assert guessed["token_ids"] == plain["token_ids"]
    assert plain["layers"] == online["layers"]
    first, exact = (result["logprobs"][1][0] for result in (plain, online))
    assert first != exact, "the cache was not in FP8"
    assert first == pytest.approx(exact, abs=0.3)
