"""Loading safetensors: every fault is one clear line, and memory never holds the bf16 model beside the INT8 one."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rowint8.baseline_engine.checkpoint import load_model, resolve_folder
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.layers import WeightFormat
from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.kernels.quantize import quantize_rowwise
from tests.tiny_models import write_tiny

CPU = torch.device("cpu")
GATE = "model.layers.1.mlp.gate_proj.weight"
INDEX = "model.safetensors.index.json"

MEASURE_LOAD = """
import json, pathlib, sys
import psutil, torch
from rowint8.baseline_engine.checkpoint import load_model
from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.baseline_engine.layers import WeightFormat
from rowint8.baseline_engine.metrics import PeakMemory
from rowint8.kernels.quantize import quantize_rowwise

quantize_rowwise(torch.ones(1 << 11, 1 << 11))  # loads the libraries' code, which counts as memory too
folder, cpu = pathlib.Path(sys.argv[1]), torch.device("cpu")
config = ModelConfig.from_folder(folder)
peak = PeakMemory(cpu)
peak.reset()
before = psutil.Process().memory_info().rss
model = load_model(folder, config, WeightFormat(torch.bfloat16, cpu, int8=True))
print(json.dumps([peak.read() - before, model.weight_bytes]))
"""


SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "attention_bias": True}


def write_model(folder, *, max_shard_size="1GB", **overrides):
    return write_tiny(folder, max_shard_size=max_shard_size, **(SHAPE | {"tie_word_embeddings": False} | overrides))


@pytest.fixture
def model_folder(tmp_path):
    return write_model(tmp_path)


@pytest.fixture
def sharded_folder(tmp_path):
    return write_model(tmp_path, max_shard_size="20KB")


def load(folder, *, dtype=torch.float32, int8=False):
    return load_model(folder, ModelConfig.from_folder(folder), WeightFormat(dtype, CPU, int8))


def edit(folder, change):
    """Rewrites model.safetensors after `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_every_tensor_lands_in_its_rows(sharded_folder):
    model = load(sharded_folder)
    reference = LlamaForCausalLM.from_pretrained(sharded_folder, dtype=torch.float32).state_dict()
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        for kind in ("weight", "bias"):
            parts = [reference[f"{prefix}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            assert torch.equal(getattr(layer.attention.qkv, kind), torch.cat(parts))
        gate_up = [reference[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(layer.mlp.gate_up.weight, torch.cat(gate_up))
        assert torch.equal(layer.mlp.down.weight, reference[f"{prefix}.mlp.down_proj.weight"])
    assert torch.equal(model.lm_head.weight, reference["lm_head.weight"])
    assert torch.equal(model.embedding.weight, reference["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_is_made_from_the_stored_weights(tmp_path, stored):
    """Not from a copy already rounded to the activation dtype."""
    folder = write_model(tmp_path, dtype=stored)
    gate = load_file(folder / "model.safetensors")[GATE]
    assert gate.dtype == stored
    expected = quantize_rowwise(gate)
    layer = load(folder, dtype=torch.bfloat16, int8=True).layers[1].mlp.gate_up
    assert torch.equal(layer.values[:48], expected.values)
    assert torch.equal(layer.scale[:48], expected.scale)


def test_tied_embeddings_are_one_tensor(tmp_path):
    folder = write_model(tmp_path, tie_word_embeddings=True)
    model = load(folder)
    assert model.lm_head is model.embedding
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load(folder).embedding.weight, model.embedding.weight)


def test_stored_rotary_frequencies_are_ignored(model_folder):
    edit(model_folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(model_folder)


def set_nan(name):
    def change(tensors):
        tensors[name].view(-1)[-1] = float("nan")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(GATE), f"{GATE} is missing"),
        (lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.bias"), "k_proj.bias is missing"),
        (lambda tensors: tensors.update(surprise=torch.ones(1)), "unexpected tensor 'surprise'"),
        (
            lambda tensors: tensors.update({GATE: torch.ones(47, 32)}),
            r"gate_proj.weight has shape \[47, 32\].*\[48, 32\]",
        ),
        (
            lambda tensors: tensors.update({GATE: torch.ones(48, 32, dtype=torch.int8)}),
            "gate_proj.weight is I8; accepted",
        ),
        (lambda tensors: tensors.update({GATE: torch.ones(48, 32, dtype=torch.float64)}), "gate_proj.weight is F64"),
        (set_nan(GATE), "gate_proj.weight.*NaN"),
        (set_nan("model.embed_tokens.weight"), "embed_tokens.weight.*NaN"),
        (set_nan("model.layers.0.input_layernorm.weight"), "input_layernorm.weight.*NaN"),
        (set_nan("model.layers.0.self_attn.v_proj.bias"), "v_proj.bias.*NaN"),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_faulty_tensors_are_named(model_folder, change, message, int8):
    edit(model_folder, change)
    with pytest.raises(EngineError, match=message) as caught:
        load(model_folder, int8=int8)
    assert "\n" not in str(caught.value)


def test_weights_beyond_fp16_are_refused_in_fp16(model_folder):
    edit(model_folder, lambda tensors: tensors["lm_head.weight"].fill_(1e5))
    load(model_folder)
    with pytest.raises(EngineError, match=r"lm_head\.weight: holds NaN or Inf as float16"):
        load(model_folder, dtype=torch.float16)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_a_truncated_shard_is_named(sharded_folder, keep):
    shard = sorted(sharded_folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(EngineError, match=f"{shard.name} is truncated"):
        load(sharded_folder)


def test_a_missing_shard_is_named(sharded_folder):
    shard = sorted(sharded_folder.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(EngineError, match=f"names {shard.name}, which is missing"):
        load(sharded_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "is no safetensors index"),
        ('{"weight_map": 3}', "is no safetensors index"),
        ('{"weight_map": {}}', "is no safetensors index"),
    ],
)
def test_a_broken_index_is_named(sharded_folder, content, message):
    (sharded_folder / INDEX).write_text(content)
    with pytest.raises(EngineError, match=f"{INDEX} {message}"):
        load(sharded_folder)


def test_pickles_are_never_opened(model_folder):
    (model_folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EngineError, match=r"pytorch_model\.bin; only safetensors load"):
        load(model_folder)


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nowhere"])
def test_a_model_that_is_no_folder(name):
    with pytest.raises(EngineError, match="is no folder here; give a folder or a hub name"):
        resolve_folder(name)


def test_a_hub_name_fetches_no_code_and_no_pickles(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo_id, *, allow_patterns):
        asked[repo_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_folder("some-owner/some-model") == tmp_path
    patterns = asked["some-owner/some-model"]
    assert "*.safetensors" in patterns
    assert not {"*", "*.py", "*.bin", "*.pt"} & set(patterns)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def snapshot_download(repo_id, *, allow_patterns):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(EngineError, match="cannot be fetched from the hub: no route") as caught:
        resolve_folder("some-owner/some-model")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's high-water mark of memory")
def test_loading_int8_never_holds_the_bf16_model(tmp_path):
    big = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = LlamaConfig(**big, vocab_size=64, num_key_value_heads=16, tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]
    weights = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    bf16_bytes = sum(tensor.nbytes for tensor in weights.values())
    del weights
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    # In a process of its own: here, memory that earlier tests freed would be used again and not be seen to grow.
    output = subprocess.run([sys.executable, "-c", MEASURE_LOAD, str(tmp_path)], check=True, capture_output=True).stdout
    grown, weight_bytes = json.loads(output)
    one_tensor = (2 + 1) * 4096 * 1024  # as bf16 and, before it goes to its place, as INT8
    one_block = 32 << 20  # a block's fp32 copies in the quantizer, about 10 MB, and libraries at their first use
    assert grown > 0.95 * weight_bytes, "the weights themselves must have been counted"
    assert grown < weight_bytes + one_tensor + one_block, f"{(grown - weight_bytes) / 2**20:.0f} MiB beyond the weights"
    assert grown < bf16_bytes, "not even the bf16 model alone would fit into that"
