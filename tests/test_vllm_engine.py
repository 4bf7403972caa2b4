"""The vLLM plugin inside the real engine (CPU build): what it computes, and for which layers."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, MixtralConfig

from rowint8.baseline_engine.config import EngineConfig
from rowint8.baseline_engine.engine import Engine
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.kernels.quantize import quantize_rowwise
from tests.vllm_harness import LLM, SAMPLING, TINY, Driver, assert_close, assert_follows, make_tiny, options, oracle

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def special_driver(tmp_path_factory):
    """For Triton's interpreter, and for two ranks on two cores."""
    log = tmp_path_factory.mktemp("special") / "log"
    driver = Driver(log, TRITON_INTERPRET="1", VLLM_CPU_OMP_THREADS_BIND="0|1")
    yield driver
    driver.stop()


def digest(tensor: torch.Tensor) -> list:
    digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
    return [str(tensor.dtype), list(tensor.shape), digest]


@pytest.fixture(scope="module")
def smollm2_prompts(smollm2) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [tokenizer(text).input_ids for text in ("The capital of France is", "Water boils at", "def fib(n):\n")]


@pytest.fixture(scope="module")
def smollm2_run(driver, smollm2, smollm2_prompts) -> dict:
    return driver.works(smollm2, prompts=smollm2_prompts, llm=LLM, sampling=SAMPLING | {"max_tokens": 32})


def test_smollm2_says_what_the_dequantized_model_says(smollm2, smollm2_prompts, smollm2_run):
    assert AutoTokenizer.from_pretrained(smollm2).decode(smollm2_run["token_ids"][0]).startswith(" Paris")
    model = oracle(smollm2)
    assert_follows(smollm2_run, smollm2_prompts, lambda tokens: model(tokens).logits)


def test_smollm2_equals_the_baseline_engine(smollm2, smollm2_prompts, smollm2_run):
    engine = Engine(EngineConfig(str(smollm2), quantization="rowint8", dtype="float32", device="cpu"))

    def logits(tokens):
        cache = KvCache.allocate(engine.model_config, 1, tokens.shape[1], torch.float32, engine.device)
        positions = torch.arange(tokens.shape[1])[None]
        return engine.model.logits(engine.model(tokens, positions, cache.row(0), mask=None))

    assert_follows(smollm2_run, smollm2_prompts, logits)


def test_smollm2_holds_the_bits_of_quantize_rowwise(smollm2, smollm2_run):
    tensors = load_file(smollm2 / "model.safetensors")
    layers = {name: layer for name, layer in smollm2_run["layers"].items() if name.endswith("_proj")}
    assert len(layers) == 4 * 30
    for name, layer in layers.items():
        parent, kind = name.rsplit(".", 1)
        parts = [tensors[f"{parent}.{part}.weight"] for part in PARTS.get(kind, [kind])]
        values, scale = quantize_rowwise(torch.cat(parts))
        numbers = {"weight": digest(values), "weight_scale": digest(scale)}
        assert layer == {"method": "RowInt8LinearMethod", **numbers}


def test_triton_kernel_inside_the_engine(special_driver, tiny, online):
    result = special_driver.works(tiny, triton=True)
    assert result["triton_calls"] > 0
    assert result["token_ids"] == online["token_ids"]
    assert_close(result["logprobs"], online["logprobs"])


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


def test_experts_stay_unquantized(driver, tmp_path):
    folder = make_tiny(tmp_path / "mixtral", MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    result = driver.works(folder)
    assert result["layers"]["model.layers.0.self_attn.qkv_proj"]["method"] == "RowInt8LinearMethod"
    assert all(len(tokens) == SAMPLING["max_tokens"] for tokens in result["token_ids"])
    assert driver.log.read_text().count("the experts of this model stay unquantized") == 1


def test_dummy_weights(driver, tiny):
    result = driver.works(tiny, llm={**TINY, "load_format": "dummy"})
    dtypes = {layer["weight"][0] for name, layer in result["layers"].items() if name.endswith("_proj")}
    assert dtypes == {"torch.int8"}


def test_tensor_parallel_uses_the_scales_of_whole_rows(driver, special_driver, tmp_path):
    folder = make_tiny(tmp_path / "two_kv_heads", num_key_value_heads=2)
    alone = driver.works(folder)
    split = special_driver.works(folder, llm={**TINY, "tensor_parallel_size": 2})
    assert split["token_ids"] == alone["token_ids"]
    assert_close(split["logprobs"], alone["logprobs"])
    assert len(split["ranks"]) == 2
    for rank in split["ranks"]:
        for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
            assert rank[name]["weight_scale"] == alone["layers"][name]["weight_scale"]
            assert rank[name]["weight"][1][1] * 2 == alone["layers"][name]["weight"][1][1]
