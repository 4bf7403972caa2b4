"""The vLLM plugin inside the real engine (CPU build): what it computes, and for which layers."""

from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2MoeConfig

from rowint8.kernels.quantize import quantize_rowwise
from tests.baseline_engine.harness import engine_for, prompt_logits
from tests.vllm_plugin.harness import (
    A8,
    LLM,
    SAMPLING,
    TINY,
    Driver,
    assert_close,
    assert_follows,
    assert_loaded_layer_by_layer,
    caches_in,
    make_tiny,
    options,
    oracle,
)
from tests.vllm_plugin.vllm_driver import describe

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

GATE_UP = 2 * 1536 * 576
"""Weights in SmolLM2's largest layer."""
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def special_driver(tmp_path_factory):
    """For Triton's interpreter, and for two ranks on two cores."""
    folder = tmp_path_factory.mktemp("special")
    env = {"TRITON_INTERPRET": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    driver = Driver(folder / "log", **env, **caches_in(folder))
    yield driver
    driver.stop()


@pytest.fixture(scope="module")
def smollm2_prompts(smollm2) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [tokenizer(text).input_ids for text in ("The capital of France is", "Water boils at", "def fib(n):\n")]


@pytest.fixture(scope="module")
def smollm2_run(driver, smollm2, smollm2_prompts) -> dict:
    return driver.works(
        smollm2, prompts=smollm2_prompts, llm=LLM, sampling=SAMPLING | {"max_tokens": 32}, load_memory=True
    )


def test_smollm2_says_what_the_dequantized_model_says(smollm2, smollm2_prompts, smollm2_run):
    assert AutoTokenizer.from_pretrained(smollm2).decode(smollm2_run["token_ids"][0]).startswith(" Paris")
    model = oracle(smollm2)
    assert_follows(smollm2_run, smollm2_prompts, lambda tokens: model(tokens).logits)


def test_smollm2_equals_the_baseline_engine(smollm2, smollm2_prompts, smollm2_run):
    engine = engine_for(smollm2, quantization="rowint8")
    assert_follows(smollm2_run, smollm2_prompts, lambda tokens: prompt_logits(engine, tokens[0].tolist())[None])


def test_smollm2_holds_the_bits_of_quantize_rowwise(smollm2, smollm2_run):
    tensors = load_file(smollm2 / "model.safetensors")
    layers = {name: layer for name, layer in smollm2_run["layers"].items() if name.endswith("_proj")}
    assert len(layers) == 4 * 30
    for name, layer in layers.items():
        parent, kind = name.rsplit(".", 1)
        parts = [tensors[f"{parent}.{part}.weight"] for part in PARTS.get(kind, [kind])]
        values, scale = quantize_rowwise(torch.cat(parts))
        numbers = {"weight": describe(values), "weight_scale": describe(scale)}
        assert layer == {"method": "RowInt8LinearMethod", **numbers}


def test_smollm2_loads_layer_by_layer(smollm2_run):
    assert_loaded_layer_by_layer(smollm2_run["load_memory"], layer_bytes=GATE_UP * 4)


def test_triton_kernel_inside_the_engine(special_driver, tiny, online):
    result = special_driver.works(tiny, triton=True, sampling=SAMPLING | {"max_tokens": 4})
    assert result["triton_calls"] > 0
    assert result["token_ids"] == [tokens[:4] for tokens in online["token_ids"]]
    assert_close(result["logprobs"], [positions[:4] for positions in online["logprobs"]])


def test_ignored_layers_stay_unquantized(driver, tiny, online):
    ignore = ["re:.*down_proj", "model.layers.1.self_attn.o_proj", "re:.*layers.0.*(q|k|v)_proj"]
    result = driver.works(tiny, llm=options(ignore=ignore))
    plain = {name for name, layer in result["layers"].items() if layer["method"] == "UnquantizedLinearMethod"}
    assert plain == {
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.o_proj",
    }
    for name in set(online["layers"]) - plain:
        assert result["layers"][name] == online["layers"][name]


def test_ignoring_one_part_of_a_merged_layer_is_refused(driver, tiny):
    error = driver.fails(tiny, llm=options(ignore=["re:.*gate_proj"]))
    assert "gate_up_proj" in error


def test_dummy_weights(driver, tiny):
    result = driver.works(tiny, llm={**TINY, "load_format": "dummy"})
    dtypes = {layer["weight"][0] for name, layer in result["layers"].items() if name.endswith("_proj")}
    assert dtypes == {"torch.int8"}


def test_tensor_parallel_fused_and_compiled_says_what_one_rank_says_eager(driver, special_driver, tmp_path):
    """A dense layer, one of experts with a shared one, and a tied INT8 head of a padded vocabulary."""
    experts = {"num_experts": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64}
    shape = {"num_key_value_heads": 2, "mlp_only_layers": [0], "vocab_size": 100, "tie_word_embeddings": True}
    folder = make_tiny(tmp_path / "model", Qwen2MoeConfig, **shape, **experts)
    llm = options(lm_head=True)
    alone = driver.works(folder, prompts=[[1, 5, 9, 23, 77, 30], [4, 99, 3]], llm=llm)
    llm |= {"tensor_parallel_size": 2, "enforce_eager": False}
    split = special_driver.works(folder, prompts=[[1, 5, 9, 23, 77, 30], [4, 99, 3]], llm=llm)
    assert split["token_ids"] == alone["token_ids"]
    assert_close(split["logprobs"], alone["logprobs"])
    assert special_driver.log.read_text().count("one kernel in the model's 2 gate_up layers") == 2, "once a rank"
    assert len(split["ranks"]) == 2
    rows_split_by_column = {
        "model.layers.0.self_attn.o_proj": "weight",
        "model.layers.0.mlp.down_proj": "weight",
        "model.layers.1.mlp.experts.routed_experts": "w2_weight",
    }
    for rank in split["ranks"]:
        assert rank["model.embed_tokens"]["weight"][:2] == ["torch.int8", [64, 64]]
        for name, weight in rows_split_by_column.items():
            whole, part = alone["layers"][name], rank[name]
            assert part[f"{weight}_scale"] == whole[f"{weight}_scale"]
            assert part[weight][1][-1] * 2 == whole[weight][1][-1]


def test_two_ranks_round_activations_as_one_does_but_for_the_scales_of_their_parts_of_a_token(
    driver, special_driver, tiny
):
    llm = options(rotation_block=16, **A8)
    alone = driver.works(tiny, llm=llm)
    split = special_driver.works(tiny, llm={**llm, "tensor_parallel_size": 2})
    down = "model.layers.0.mlp.down_proj"
    assert all(rank[down]["weight_scale"] == alone["layers"][down]["weight_scale"] for rank in split["ranks"])
    positions = (chain.from_iterable(result["prompt_logprobs"]) for result in (split, alone))
    for ours, theirs in zip(*positions, strict=True):
        both = ours.keys() & theirs.keys()  # the prompt's token, and likely ones, which may change places
        assert both
        assert [ours[token] for token in both] == pytest.approx([theirs[token] for token in both], abs=0.3)
