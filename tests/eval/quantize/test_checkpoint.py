"""`rowint8 quantize`: what it writes, what reads it, what it refuses, and that nothing half written is ever seen."""

import json
import re
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from rowint8.baseline_engine.config import EngineConfig
from rowint8.baseline_engine.engine import Engine
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.sampler import SamplingParams
from rowint8.eval.errors import EvalError
from rowint8.eval.processes import console_script
from rowint8.eval.quality.fidelity_setups import stored_setup
from rowint8.eval.quantize import checkpoint as job
from rowint8.eval.quantize.formats import packed_tensors
from rowint8.eval.quantize.layers import ignored_layers
from rowint8.eval.quantize.source import open_source
from rowint8.kernels.activations import LARGEST_BLOCK
from rowint8.kernels.quantize import Int8Weight, dequantize, quantize_rowwise

INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj"
PROMPTS = [[1, 5, 9, 23, 77, 30], [4, 90, 3]]

MEASURE_WRITE = """
import json, pathlib, sys
import psutil, torch
from rowint8.baseline_engine.metrics import PeakMemory
from rowint8.eval.quantize import checkpoint as job
from rowint8.eval.quantize.source import open_source
from rowint8.kernels.quantize import quantize_rowwise

quantize_rowwise(torch.ones(1 << 11, 1 << 11))  # loads the libraries' code, which counts as memory too
source = open_source(pathlib.Path(sys.argv[1]))
peak = PeakMemory(torch.device("cpu"))
peak.reset()
before = psutil.Process().memory_info().rss
job.write_checkpoint(source, pathlib.Path(sys.argv[2]), "rowint8", (), job.round_to_nearest(source.layers))
print(peak.read() - before)
"""


def write_model(folder, config_class=LlamaConfig, max_shard_size="1GB", **options):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = config_class(**(shape | heads | options), initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


def quantize(folder, out, form="rowint8", ignore=(), rotation=None):
    source = open_source(folder)
    ignored = ignored_layers(source.layers, ignore)
    convert = job.round_to_nearest(source.layers - ignored, rotation)
    job.write_checkpoint(source, out, form, ignored, convert, rotation=rotation)
    return out


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_sharded_tensors_are_those_of_quantize_rowwise(tmp_path):
    folder = write_model(tmp_path / "model", Qwen2Config, max_shard_size="60KB")
    out = quantize(folder, tmp_path / "out")
    originals, written = tensors_of(folder), tensors_of(out)
    expected = dict(originals)
    for name in originals:
        if re.fullmatch(r".*_proj\.weight", name):
            expected[name], expected[f"{name}_scale"] = quantize_rowwise(originals[name])
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert all(written[name].dtype == expected[name].dtype for name in expected)
    index = json.loads((out / INDEX).read_text())
    files = {name: path.name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert len(set(files.values())) > 2
    assert index["weight_map"] == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())


def test_config_and_other_files(model, tmp_path):
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("x")
    (model / "modeling.py").write_text("")
    (model / "pytorch_model.bin").write_text("")
    out = quantize(model, tmp_path / "out", ignore=["re:.*down_proj", "model.layers.0.self_attn.o_proj"])
    config = json.loads((out / "config.json").read_text())
    ignored = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    assert config.pop("quantization_config") == {"quant_method": "rowint8", "ignore": ignored}
    assert config == json.loads((model / "config.json").read_text())
    copied = {"tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == copied
    tensors = tensors_of(out)
    floats = {name for name in tensors if name.endswith("_proj.weight") and tensors[name].is_floating_point()}
    assert floats == {f"{layer}.weight" for layer in ignored}


def test_the_small_engine_says_the_same_as_when_quantizing_on_load(model, tmp_path):
    out = quantize(model, tmp_path / "out")
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    engines = [Engine(EngineConfig(str(folder), quantization="rowint8", device="cpu")) for folder in (model, out)]
    online, stored = (engine.generate(PROMPTS, sampling) for engine in engines)
    assert [c.token_ids for c in online] == [c.token_ids for c in stored]
    buffers = [dict(engine.model.named_buffers()) for engine in engines]
    assert all(torch.equal(buffers[1][name], tensor) for name, tensor in buffers[0].items())


def test_rotated_rows_are_those_of_quantizing_on_load_for_int8_activations(model, tmp_path):
    out = quantize(model, tmp_path / "out", rotation=LARGEST_BLOCK)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization == {"quant_method": "rowint8", "activations": "int8", "rotation_block": 256}
    online = Engine(EngineConfig(str(model), quantization="rowint8", activations="int8", device="cpu"))
    for given in ({}, {"activations": "int8"}):
        stored = Engine(EngineConfig(str(out), device="cpu", **given))
        buffers = dict(stored.model.named_buffers())
        assert all(torch.equal(buffers[name], tensor) for name, tensor in online.model.named_buffers())
        assert stored.model.layers[0].mlp.gate_up.block == online.model.layers[0].mlp.gate_up.block > 1


def test_a_stored_block_smaller_than_the_largest_is_that_of_the_engine(model, tmp_path):
    engine = Engine(EngineConfig(str(quantize(model, tmp_path / "out", rotation=16)), device="cpu"))
    assert engine.model.layers[0].mlp.gate_up.block == 16


ROTATIONS = {256: {"activations": "int8", "rotation_block": 256}, 16: {"activations": "int8", "rotation_block": 16}}
OTHER_ROWS = [(None, 256), (None, 16), (256, None), (256, 16), (16, 256)]


@pytest.mark.parametrize(("stored", "said"), OTHER_ROWS)
def test_a_config_edited_to_rotate_rows_otherwise_is_refused(model, tmp_path, stored, said):
    out = quantize(model, tmp_path / "out", rotation=stored)
    path = out / "config.json"
    config = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "rowint8"} | ROTATIONS.get(said, {})
    }
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"model\S*\.safetensors: its rows .* asks for rows that are") as caught:
        Engine(EngineConfig(str(out), device="cpu"))
    with pytest.raises(EvalError, match=r"its rows .* asks for rows that are"):
        stored_setup(out)
    assert "\n" not in str(caught.value)


def test_the_small_engine_refuses_what_it_cannot_run(model, tmp_path):
    out = quantize(model, tmp_path / "out")
    partly = quantize(model, tmp_path / "partly", ignore=["re:.*down_proj"])
    with pytest.raises(EngineError, match="run this one in vLLM"):
        Engine(EngineConfig(str(partly), quantization="rowint8", device="cpu"))
    edit(out, lambda tensors: tensors.update({f"{DOWN}.weight": tensors[f"{DOWN}.weight"].float()}))
    with pytest.raises(EngineError, match=r"down_proj\.weight is F32; accepted are I8"):
        Engine(EngineConfig(str(out), quantization="rowint8", device="cpu"))
    edit(quantize(model, tmp_path / "incomplete"), lambda tensors: tensors.pop(f"{DOWN}.weight_scale"))
    with pytest.raises(EngineError, match=r"down_proj\.weight_scale is missing"):
        Engine(EngineConfig(str(tmp_path / "incomplete"), quantization="rowint8", device="cpu"))


@pytest.mark.parametrize(("config_class", "options"), [(LlamaConfig, {}), (Qwen2Config, {"tie_word_embeddings": True})])
def test_transformers_reads_compressed_tensors(tmp_path, config_class, options):
    folder = write_model(tmp_path / "model", config_class, **options)
    out = quantize(folder, tmp_path / "out", "compressed-tensors", ["model.layers.0.self_attn.o_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in reference.named_parameters():
        if name.endswith("_proj.weight") and "layers.0.self_attn.o_proj" not in name:
            parameter.data = dequantize(quantize_rowwise(parameter.data))
    tokens = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("columns", [1, 3, 4, 37])
def test_packing_is_that_of_the_library(columns):
    values = torch.randint(-127, 128, (5, columns), dtype=torch.int8)
    packed = packed_tensors("layer", Int8Weight(values, torch.ones(5, dtype=torch.float16)))["layer.weight_packed"]
    assert packed.shape == (5, -(-columns // 4))
    assert torch.equal(unpack_from_int32(packed, 8, torch.Size((5, columns))), values)


def test_vllm_takes_compressed_tensors_as_weight_only_int8(model, tmp_path):
    """Its kernels for it are for GPUs; here it parses the config and picks the scheme."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    out = quantize(model, tmp_path / "out", "compressed-tensors")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = CompressedTensorsConfig.from_config(settings).get_scheme(torch.nn.Linear(64, 64), layer_name=DOWN)
    assert type(scheme).__name__ == "CompressedTensorsWNA16"
    assert (scheme.num_bits, scheme.strategy, scheme.symmetric, scheme.group_size) == (8, "channel", True, -1)


REFUSED = {
    "existing target": (lambda model, out: out.mkdir(), "exists already; remove it"),
    "NaN": (
        lambda model, out: edit(model, lambda t: t[f"{DOWN}.weight"].__setitem__((7, 3), float("nan"))),
        f"{DOWN}.weight: row 7 holds NaN or Inf",
    ),
    "NaN in a norm": (
        lambda model, out: edit(model, lambda t: t["model.norm.weight"].__setitem__(3, float("nan"))),
        "model.norm.weight holds NaN or Inf",
    ),
    "Inf in an embedding": (
        lambda model, out: edit(model, lambda t: t["model.embed_tokens.weight"].__setitem__((7, 3), -float("inf"))),
        "model.embed_tokens.weight holds NaN or Inf",
    ),
    "tensor missing": (lambda model, out: edit(model, lambda t: t.pop(f"{DOWN}.weight")), f"{DOWN}.weight is missing"),
    "truncated": (
        lambda model, out: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors is truncated",
    ),
    "no weights": (lambda model, out: (model / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda model, out: (model / "config.json").unlink(), "config.json is missing"),
    "shard missing": (
        lambda model, out: (model / INDEX).write_text('{"weight_map": {"a": "model-2-of-2.safetensors"}}'),
        "model-2-of-2.safetensors, which is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_one_line_and_leave_nothing(model, tmp_path, case):
    change, message = REFUSED[case]
    out = tmp_path / "out"
    change(model, out)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(EvalError, match=re.escape(message)) as caught:
        quantize(model, out)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_quantized_checkpoint_is_refused(model, tmp_path):
    out = quantize(model, tmp_path / "out")
    with pytest.raises(EvalError, match=r"already quantized \(rowint8\)"):
        open_source(out)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (GPT2Config, {}, "the model has no linear layers"),
    ],
)
def test_models_that_cannot_be_quantized(tmp_path, config_class, options, message):
    with pytest.raises(EvalError, match=message):
        open_source(write_model(tmp_path / "model", config_class, **options))


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("re:(", "is not a regular expression"),
        ("down_proj", "matches no linear layer; layers are named like"),
        ("model.layers.1.mlp.down_projX", "matches no linear layer"),
        ("re:.*gate_proj", "names model.layers.0.mlp.gate_proj but not model.layers.0.mlp.up_proj"),
        ("model.layers.0.self_attn.k_proj", "but not model.layers.0.self_attn.q_proj"),
    ],
)
def test_ignore_is_checked(model, ignore, message):
    with pytest.raises(EvalError, match=message):
        ignored_layers(open_source(model).layers, [ignore])


def test_an_interrupted_run_leaves_nothing_under_the_final_name(model, tmp_path):
    seen = []

    def advance():
        seen.append(sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")))
        if len(seen) == 5:
            raise KeyboardInterrupt

    source = open_source(model)
    with pytest.raises(KeyboardInterrupt):
        job.write_checkpoint(source, tmp_path / "out", "rowint8", (), job.round_to_nearest(source.layers), advance)
    assert seen == [["model"]] * 5
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's high-water mark of memory")
def test_memory_is_that_of_one_file(tmp_path):
    folder = tmp_path / "model"
    big = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = LlamaConfig(**big, num_hidden_layers=8, vocab_size=64, tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu").to(torch.bfloat16).apply(lambda part: [p.data.fill_(0.5) for p in part.parameters()])
    model.save_pretrained(folder, max_shard_size="70MB")
    del model
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(shards) >= 4
    command = [sys.executable, "-c", MEASURE_WRITE, str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True).stdout)
    one_block = 32 << 20  # a block's fp32 copies in the quantizer, about 10 MB, and libraries at their first use
    assert grown < max(shards) + one_block, f"{grown / 2**20:.0f} MiB for files of {max(shards) / 2**20:.0f} MiB"
    assert max(shards) + one_block < sum(shards) / 2, "holding the whole INT8 model must fail this test"


def test_the_command(model, tmp_path):
    out = tmp_path / "out"
    command = [console_script("rowint8"), "quantize", str(model), str(out), "--ignore", f"{DOWN}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "13 linear layers in INT8" in done.stdout
    assert tensors_of(out)[f"{DOWN}.weight"].dtype == torch.float32
    rotated = [*command[:3], str(tmp_path / "rotated"), "--activations", "int8"]
    bad = subprocess.run([*rotated, "--format", "compressed-tensors"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)
    assert "--activations int8 rotates rows, which compressed-tensors does not know" in bad.stderr
    subprocess.run(rotated, check=True, capture_output=True)
    assert '"activations": "int8"' in (tmp_path / "rotated" / "config.json").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr == f"rowint8: {out} exists already; remove it or give another folder\n"
