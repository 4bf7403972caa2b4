"""The INT8 head, and the embedding where it is tied, inside the real engine. The vocabulary of 100 is padded to 128."""

import json

import pytest
from safetensors.torch import load_file

from tests.vllm_plugin.harness import (
    TINY,
    assert_close,
    assert_follows,
    edited_copy,
    make_tiny,
    options,
    oracle,
    prequantized,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPTS = [[1, 5, 9, 23, 77, 30], [4, 99, 3], [90]]
HEAD = {True: "model.embed_tokens", False: "lm_head"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """Folders of a model with a tied head and of one without, by `tie_word_embeddings`."""
    folder = tmp_path_factory.mktemp("models")
    tie = (True, False)
    return {tied: make_tiny(folder / str(tied), vocab_size=100, tie_word_embeddings=tied) for tied in tie}


@pytest.fixture(scope="module")
def online(driver, models) -> dict:
    return {tied: driver.works(folder, prompts=PROMPTS, llm=options(lm_head=True)) for tied, folder in models.items()}


def vocab_layers(result: dict) -> dict:
    return {name: layer for name, layer in result["layers"].items() if not name.endswith("_proj")}


@pytest.mark.newest
@pytest.mark.parametrize("tied", [True, False])
def test_it_says_what_the_dequantized_model_says(models, online, tied):
    model = oracle(models[tied], lm_head=True)
    assert_follows(online[tied], PROMPTS, lambda tokens: model(tokens).logits)


def test_a_tied_pair_is_one_int8_copy(online):
    layers = vocab_layers(online[True])
    assert list(layers) == ["model.embed_tokens"]
    assert layers["model.embed_tokens"]["weight"][:2] == ["torch.int8", [128, 64]]
    assert layers["model.embed_tokens"]["weight_scale"][:2] == ["torch.float16", [128]]


def test_an_embedding_that_is_not_the_head_stays_unquantized(online):
    layers = vocab_layers(online[False])
    assert layers["model.embed_tokens"]["weight"][0] == "torch.float32"
    assert layers["lm_head"]["weight"][0] == "torch.int8"


def test_models_that_tie_by_the_parameter_share_the_tensors_too(driver, models, online):
    result = driver.works(
        models[True], prompts=PROMPTS, llm=options(lm_head=True), tie_by_weight=True, reload=str(models[True])
    )
    assert result["same_memory"] is True
    assert result["token_ids"] == online[True]["token_ids"]
    assert_close(result["logprobs"], online[True]["logprobs"])
    head, embedding = (result["layers"][name] for name in ("lm_head", "model.embed_tokens"))
    assert head["method"] == "TiedHeadMethod"
    assert (head["weight"], head["weight_scale"]) == (embedding["weight"], embedding["weight_scale"])


def with_int8_head(source, folder, tied, edit=lambda tensors: None):
    folder = prequantized(source, folder, edit, also=(f"{HEAD[tied]}.weight",))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["lm_head"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_prequantized_equals_online_bit_for_bit(driver, models, online, tmp_path, tied):
    folder = with_int8_head(models[tied], tmp_path / "int8", tied)
    assert driver.works(folder, prompts=PROMPTS, llm={**TINY, "quantization": None}) == online[tied]


def test_reloaded_weights_are_the_same_in_the_same_memory(driver, models, online):
    result = driver.works(models[False], prompts=PROMPTS, llm=options(lm_head=True), reload=str(models[False]))
    assert result.pop("same_memory") is True
    assert result == online[False]


def test_a_saved_sharded_state_is_the_same(driver, models, online, tmp_path):
    saved = driver.saves_and_loads(models[True], tmp_path / "saved", prompts=PROMPTS, llm=options(lm_head=True))
    assert saved == online[True]


def test_damaged_heads_are_refused(driver, models, tmp_path):
    folder = with_int8_head(models[True], tmp_path / "no_scale", True, lambda t: t.pop(f"{HEAD[True]}.weight_scale"))
    error = driver.fails(folder, llm={**TINY, "quantization": None})
    assert "embed_tokens.weight_scale: the checkpoint fills 0 of its 100 numbers" in error
    tensors = load_file(models[False] / "model.safetensors")
    short = tensors["lm_head.weight"][:90].clone()
    folder = edited_copy(models[False], tmp_path / "short", lambda t: t.update({"lm_head.weight": short}))
    error = driver.fails(folder, llm=options(lm_head=True))
    assert "lm_head.weight: the checkpoint has shape [90, 64], expected [100, 64]" in error
