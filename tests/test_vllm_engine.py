"""The vLLM plugin inside the real engine (CPU build). Engines run in processes of their own: see vllm_driver.py."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, Qwen2Config

from rowint8.baseline_engine.config import EngineConfig
from rowint8.baseline_engine.engine import Engine
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.kernels.quantize import dequantize, quantize_rowwise

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
LLM = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8, "dtype": "float32"}
TINY = {**LLM, "skip_tokenizer_init": True}
SAMPLING = {"temperature": 0.0, "max_tokens": 16, "logprobs": 3, "prompt_logprobs": 3, "ignore_eos": True}
PROMPTS = [[1, 5, 9, 23, 77, 30], [4, 100, 3], [90]]
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Driver:
    """A process that runs one engine after another."""

    def __init__(self, log: Path, **env: str) -> None:
        plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("vllm_driver.py")],
            env=plain | ENV | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def run(self, model: Path, prompts=PROMPTS, sampling=SAMPLING, llm=TINY, **job) -> dict:
        llm = {"quantization": "rowint8", **llm}
        job |= {"model": str(model), "prompts": prompts, "sampling": sampling, "llm": llm}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the driver died: {self.log.read_text()[-3000:]}"
        return json.loads(line)

    def works(self, model: Path, **job) -> dict:
        result = self.run(model, **job)
        assert "error" not in result, result["error"]
        return result

    def fails(self, model: Path, **job) -> str:
        return self.run(model, **job)["error"]

    def stop(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver") / "log")
    yield driver
    driver.stop()


@pytest.fixture(scope="module")
def special_driver(tmp_path_factory):
    """For Triton's interpreter, and for two ranks on two cores."""
    log = tmp_path_factory.mktemp("special") / "log"
    driver = Driver(log, TRITON_INTERPRET="1", VLLM_CPU_OMP_THREADS_BIND="0|1")
    yield driver
    driver.stop()


def make_tiny(folder: Path, config_class=LlamaConfig, **options) -> Path:
    """A random fp32 model of two layers with GQA and, where the architecture has them, non-zero biases."""
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = config_class(**shape | heads | options, initializer_range=0.2, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def online(driver, tiny) -> dict:
    return driver.works(tiny)


def edited_copy(source: Path, folder: Path, edit) -> Path:
    """A copy of a checkpoint whose tensors went through `edit(dict)` in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prequantized(source: Path, folder: Path, edit=lambda tensors: None) -> Path:
    """A rowint8 checkpoint of `source`, its tensors then changed by `edit`."""

    def quantize(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale"] = quantize_rowwise(tensors[name])
        edit(tensors)

    edited_copy(source, folder, quantize)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rowint8"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def oracle(folder: Path):
    """The transformers model in fp32 with every linear weight of its layers rounded to INT8 and back."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data = dequantize(quantize_rowwise(parameter.data))
    return model


def assert_follows(result: dict, prompts: list[list[int]], logits) -> None:
    """Greedy tokens and every reported logprob are those of `logits(token ids [1, T]) -> [1, T, vocabulary]`."""
    rows = zip(prompts, result["token_ids"], result["prompt_logprobs"], result["logprobs"], strict=True)
    for prompt, tokens, prompt_logprobs, logprobs in rows:
        with torch.inference_mode():
            expected = logits(torch.tensor([prompt + tokens[:-1]]))[0].log_softmax(-1)
        assert tokens == expected[len(prompt) - 1 :].argmax(-1).tolist()
        for row, position in zip(expected, prompt_logprobs + logprobs, strict=True):
            assert position == pytest.approx({token: float(row[int(token)]) for token in position}, abs=2e-4)


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
    assert len(smollm2_run["layers"]) == 4 * 30
    for name, layer in smollm2_run["layers"].items():
        parent, kind = name.rsplit(".", 1)
        parts = [tensors[f"{parent}.{part}.weight"] for part in PARTS.get(kind, [kind])]
        values, scale = quantize_rowwise(torch.cat(parts))
        numbers = {"weight": digest(values), "weight_scale": digest(scale)}
        assert layer == {"method": "RowInt8LinearMethod", **numbers}


def test_prequantized_equals_online_bit_for_bit(driver, tiny, online, tmp_path):
    folder = prequantized(tiny, tmp_path / "int8")
    assert driver.works(folder, llm={**TINY, "quantization": None}) == online


def test_bias(driver, tmp_path):
    folder = make_tiny(tmp_path / "qwen2", Qwen2Config)
    result = driver.works(folder)
    assert "bias" in result["layers"]["model.layers.0.self_attn.qkv_proj"]
    model = oracle(folder)
    assert_follows(result, PROMPTS, lambda tokens: model(tokens).logits)
    name = "model.layers.1.self_attn.k_proj.bias"
    error = driver.fails(edited_copy(folder, tmp_path / "no_bias", lambda tensors: tensors.pop(name)))
    assert "model.layers.1.self_attn.qkv_proj.bias: the checkpoint fills 96 of its 128 numbers" in error


def test_compiled_equals_eager(driver, tiny, online):
    result = driver.works(tiny, llm={**TINY, "enforce_eager": False})
    assert result["token_ids"] == online["token_ids"]
    assert_close(result["logprobs"], online["logprobs"])


def assert_close(logprobs: list, expected: list) -> None:
    for ours, theirs in zip(logprobs, expected, strict=True):
        for position, reference in zip(ours, theirs, strict=True):
            assert position == pytest.approx(reference, abs=2e-4)


def test_triton_kernel_inside_the_engine(special_driver, tiny, online):
    result = special_driver.works(tiny, triton=True)
    assert result["triton_calls"] > 0
    assert result["token_ids"] == online["token_ids"]
    assert_close(result["logprobs"], online["logprobs"])


def test_ignored_layers_stay_unquantized(driver, tiny, online):
    ignore = ["re:.*down_proj", "model.layers.1.self_attn.o_proj", "re:.*layers.0.*(q|k|v)_proj"]
    options = {"quant_method": "rowint8", "serialized": False, "ignore": ignore}
    result = driver.works(tiny, llm={**TINY, "hf_overrides": {"quantization_config": options}})
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
    options = {"quant_method": "rowint8", "serialized": False, "ignore": ["re:.*gate_proj"]}
    error = driver.fails(tiny, llm={**TINY, "hf_overrides": {"quantization_config": options}})
    assert "gate_up_proj" in error


def test_experts_stay_unquantized(driver, tmp_path):
    folder = make_tiny(tmp_path / "mixtral", MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    result = driver.works(folder)
    assert result["layers"]["model.layers.0.self_attn.qkv_proj"]["method"] == "RowInt8LinearMethod"
    assert all(len(tokens) == SAMPLING["max_tokens"] for tokens in result["token_ids"])
    assert driver.log.read_text().count("the experts of this model stay unquantized") == 1


def test_reloaded_weights_are_the_same(driver, tiny, online):
    assert driver.works(tiny, reload=True) == online


def test_dummy_weights(driver, tiny):
    result = driver.works(tiny, llm={**TINY, "load_format": "dummy"})
    assert {layer["weight"][0] for layer in result["layers"].values()} == {"torch.int8"}


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


Q, O = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"
QS, OS = f"{Q}_scale", f"{O}_scale"
QKV, OUT = "model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj"


def put(name, index, value):
    return lambda tensors: tensors[name].__setitem__(index, value)


BAD_ONLINE = {
    "NaN": (put(O, (3, 5), float("nan")), f"{OUT}.weight: row 3 holds NaN or Inf"),
    "Inf": (put(Q, (7, 0), float("-inf")), f"{QKV}.weight: row 7 holds NaN or Inf"),
    "part missing": (lambda t: t.pop(Q), f"{QKV}.weight: the checkpoint fills 4096 of its 8192 numbers (found k, v)"),
    "weight missing": (lambda t: t.pop(O), f"{OUT}.weight: the checkpoint fills 0 of its 4096 numbers"),
    "int8": (lambda t: t.update({O: t[O].to(torch.int8)}), f"{OUT}.weight: the checkpoint has torch.int8, expected"),
}
BAD_PREQUANTIZED = {
    "scale missing": (lambda t: t.pop(OS), f"{OUT}.weight_scale: the checkpoint fills 0 of its 64 numbers"),
    "scale part missing": (lambda t: t.pop(QS), f"{QKV}.weight_scale: the checkpoint fills 64 of its 128 numbers"),
    "weight missing": (lambda t: t.pop(O), f"{OUT}.weight: the checkpoint fills 0 of its 4096 numbers"),
    "NaN scale": (put(OS, 9, float("nan")), f"{OUT}.weight_scale: row 9 is nan, not a finite scale"),
    "negative scale": (put(OS, 9, -1.0), f"{OUT}.weight_scale: row 9 is -1.0, not a finite scale"),
    "scale dtype": (lambda t: t.update({OS: t[OS].float()}), "has torch.float32, expected torch.float16"),
    "weight dtype": (lambda t: t.update({O: t[O].float()}), "has torch.float32, expected torch.int8"),
    "narrow": (lambda t: t.update({O: t[O][:, :32].clone()}), f"{OUT}.weight: the checkpoint has shape [64, 32]"),
    "tall": (lambda t: t.update({Q: t[Q].repeat(2, 1)}), f"{QKV}.weight (part q): the checkpoint has shape [128, 64]"),
}


@pytest.mark.parametrize("case", BAD_ONLINE)
def test_bad_online_checkpoints_are_refused(driver, tiny, tmp_path, case):
    edit, message = BAD_ONLINE[case]
    assert message in driver.fails(edited_copy(tiny, tmp_path / "bad", edit))


@pytest.mark.parametrize("case", BAD_PREQUANTIZED)
def test_bad_prequantized_checkpoints_are_refused(driver, tiny, tmp_path, case):
    edit, message = BAD_PREQUANTIZED[case]
    folder = prequantized(tiny, tmp_path / "bad", edit)
    assert message in driver.fails(folder, llm={**TINY, "quantization": None})


def test_a_truncated_file_is_refused(driver, tiny, tmp_path):
    folder = prequantized(tiny, tmp_path / "short")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "incomplete" in driver.fails(folder).lower()


def test_unknown_options_and_dtypes_are_refused(driver, tiny):
    options = {"quant_method": "rowint8", "serialized": False, "ignored": ["lm_head"]}
    error = driver.fails(tiny, llm={**TINY, "hf_overrides": {"quantization_config": options}})
    assert "rowint8: unknown option ignored; accepted are quant_method, serialized, ignore" in error
    assert "float64" in driver.fails(tiny, llm={**TINY, "dtype": "float64"})
