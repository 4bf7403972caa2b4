"""The plugin in vLLM's CUDA build, compiled and with CUDA graphs: what its CPU build does not have."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MixtralConfig

from rowint8.kernels.quantize import quantize_rowwise
from tests.vllm_plugin.harness import (
    PROMPTS,
    Driver,
    assert_loaded_layer_by_layer,
    caches_in,
    make_tiny,
    oracle,
    with_other_numbers,
)
from tests.vllm_plugin.vllm_driver import describe

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.gpu]

LLM = {"dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 8, "gpu_memory_utilization": 0.2}
LLM |= {"skip_tokenizer_init": True}
SLEEPY = LLM | {"enable_sleep_mode": True}
MODELS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
MEAN_NOISE = 0.1
"""Allowed mean distance of logprobs, in nats. bf16 arithmetic alone was 0.04 away from the oracle on the CPU build."""


@pytest.fixture(scope="module")
def new_driver(tmp_path_factory):
    """Makes drivers, which share what they compile with others for the same model."""
    folder, drivers = tmp_path_factory.mktemp("drivers"), []

    def make(model: Path, **env: str) -> Driver:
        log = folder / f"log{len(drivers)}"
        drivers.append(Driver(log, VLLM_USE_FLASHINFER_SAMPLER="0", **caches_in(folder / model.name), **env))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.stop()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny(folder / name, config_class, **shape) for name, (config_class, shape) in MODELS.items()}


@pytest.fixture(scope="module", params=MODELS)
def model(request, made) -> Path:
    return made[request.param]


@pytest.fixture(scope="module")
def driver(new_driver, model) -> Driver:
    """A process for each model."""
    return new_driver(model)


@pytest.fixture(scope="module")
def online(driver, model) -> dict:
    return driver.works(model, llm=LLM)


def test_it_says_what_the_dequantized_model_says(model, online):
    reference = oracle(model)
    distances = []
    runs = zip(PROMPTS, online["token_ids"], online["prompt_logprobs"], online["logprobs"], strict=True)
    for prompt, tokens, prompt_logprobs, logprobs in runs:
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens[:-1]])).logits[0].log_softmax(-1)
        reported = prompt_logprobs + logprobs
        for row, position in zip(expected[-len(reported) :], reported, strict=True):
            distances += [abs(value - float(row[int(token)])) for token, value in position.items()]
    assert sum(distances) / len(distances) < MEAN_NOISE


def test_weights_are_the_bits_of_quantize_rowwise_on_the_cpu(model, online):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    values, scale = quantize_rowwise(tensors[f"{name}.weight"].bfloat16())
    assert [online["layers"][name][key] for key in ("weight", "weight_scale")] == [describe(values), describe(scale)]
    name = "model.layers.1.block_sparse_moe.experts"
    numbers = [number for number in range(4) if f"{name}.{number}.w2.weight" in tensors]
    for ours, theirs in (("w13_weight", ("w1", "w3")), ("w2_weight", ("w2",))) if numbers else ():
        parts = [torch.cat([tensors[f"{name}.{number}.{part}.weight"] for part in theirs]) for number in numbers]
        values, scale = (
            torch.stack(each) for each in zip(*(quantize_rowwise(p.bfloat16()) for p in parts), strict=True)
        )
        experts = online["layers"][f"{name}.routed_experts"]
        assert [experts[ours], experts[f"{ours}_scale"]] == [describe(values), describe(scale)], ours


@pytest.mark.parametrize("level", [1, 2])
def test_after_a_sleep_it_says_the_same_from_the_same_memory(new_driver, model, online, level):
    result = new_driver(model).works(model, llm=SLEEPY, sleep=level)  # vLLM has one engine that can sleep in a process
    assert result["same_memory"] is True
    assert result["token_ids"] == result["before_sleep"] == online["token_ids"]
    assert result["layers"] == online["layers"]


def test_other_weights_are_reloaded_into_the_same_memory(driver, model, online, tmp_path):
    result = driver.works(with_other_numbers(model, tmp_path / "other"), llm=LLM, reload=str(model))
    assert result["same_memory"] is True
    assert result["token_ids"] == online["token_ids"]
    assert result["layers"] == online["layers"]


def test_a_model_says_the_same_where_another_was_compiled(new_driver, made):
    """But for vLLM's ahead-of-time compilation: see docs/vllm.md, "When something is wrong"."""
    driver = new_driver(made["llama"], VLLM_USE_AOT_COMPILE="0")
    driver.works(made["llama"], llm=LLM)
    after, alone = driver.works(made["mixtral"], llm=LLM), new_driver(made["mixtral"]).works(made["mixtral"], llm=LLM)
    assert after["layers"] == alone["layers"]
    assert after["token_ids"] == alone["token_ids"]


def test_a_checkpoint_is_loaded_layer_by_layer(new_driver, smollm2):
    result = new_driver(smollm2).works(smollm2, llm=LLM, load_memory=True)
    assert_loaded_layer_by_layer(result["load_memory"], layer_bytes=2 * 1536 * 576 * 2)
