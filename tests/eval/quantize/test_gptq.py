"""GPTQ: it lowers errors on inputs that it did not see, and stores other integers than rounding to nearest, no more."""

import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    NemotronConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    XGLMConfig,
)

from rowint8.baseline_engine.config import EngineConfig
from rowint8.baseline_engine.engine import Engine
from rowint8.eval.errors import EvalError
from rowint8.eval.processes import console_script
from rowint8.eval.quality.fidelity import Fidelity
from rowint8.eval.quality.fidelity_setups import original, rounded_setup, stored_setup
from rowint8.eval.quantize import gptq as job
from rowint8.eval.quantize.checkpoint import round_to_nearest, write_checkpoint
from rowint8.eval.quantize.source import open_source
from rowint8.kernels.activations import rotate
from rowint8.kernels.quantize import dequantize, quantize_rowwise
from tests.tiny_models import VOCABULARY, write_tiny


def random_windows(count, seed):
    return torch.randint(VOCABULARY, (count, 64), generator=torch.Generator().manual_seed(seed))


WINDOWS = random_windows(48, seed=1)


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def write_gptq(folder, out, ignored=(), rotation=None):
    source = open_source(folder)
    layers = source.layers - set(ignored)
    convert = job.calibrate(source, layers, WINDOWS, rotation=rotation)
    write_checkpoint(source, out, "rowint8", ignored, convert, rotation=rotation)
    return out


def test_it_lowers_the_error_on_fresh_inputs():
    torch.manual_seed(0)
    mix, weight = torch.randn(50, 200), torch.randn(48, 200)
    seen, fresh = (torch.randn(4000, 50) @ mix + 0.1 * torch.randn(4000, 200) for _ in range(2))
    rounded, nearest = job.round_compensated(weight, job.compensation(seen.T @ seen)), quantize_rowwise(weight)
    assert torch.equal(rounded.scale, nearest.scale)
    errors = [((dequantize(w) - weight) @ fresh.T).norm() for w in (rounded, nearest)]
    assert errors[0] < 0.6 * errors[1]
    assert errors[0] > 0


@pytest.mark.parametrize("columns", [1, 128, 150])
def test_independent_inputs_leave_rounding_to_nearest(columns):
    """Nothing can be made up for then; the integers are those of the project's rounding rule, column for column."""
    weight = torch.randn(16, columns)
    rounded = job.round_compensated(weight, job.compensation(torch.diag(torch.rand(columns) + 0.1)))
    assert torch.equal(rounded.values, quantize_rowwise(weight).values)


def test_blocks_change_only_the_order_of_sums(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(500, 60) @ torch.randn(60, 60), torch.randn(20, 60)
    by = job.compensation(x.T @ x)
    whole = job.round_compensated(weight, by).values
    monkeypatch.setattr(job, "BLOCK", 7)
    blocks = job.round_compensated(weight, by).values
    assert (whole == blocks).float().mean() > 0.99
    assert not torch.equal(whole, quantize_rowwise(weight).values)


def test_zero_rows_unused_inputs_and_the_limit():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 3) @ torch.randn(3, 20), torch.randn(40, 20)
    x[:, :5] = 0
    weight[1] = 0
    rounded = job.round_compensated(weight, job.compensation(x.T @ x))
    assert (rounded.values[1] == 0).all()
    assert rounded.scale[1] == 0
    assert rounded.values.int().abs().max() == 127
    assert torch.equal(rounded.values[:, :5], quantize_rowwise(weight).values[:, :5])
    assert torch.isfinite(job.compensation(torch.zeros(4, 4)).upper).all()


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (LlamaConfig, {}),
        (Gemma3TextConfig, {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ],
)
@torch.inference_mode()
def test_every_layer_sees_what_it_sees_in_the_model(tmp_path, config_class, options):
    layers = len(options.get("layer_types", "123"))
    folder = write_tiny(tmp_path / "model", config_class, num_hidden_layers=layers, head_dim=16, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.model(WINDOWS[:11], output_hidden_states=True).hidden_states
    hidden, arguments = job._layer_inputs(model, model.model.layers, WINDOWS[:11])
    for layer, keywords, states in zip(model.model.layers, arguments, expected, strict=False):
        torch.testing.assert_close(torch.cat(hidden), states, rtol=1e-4, atol=1e-4)
        linears = {"self_attn.q_proj": layer.self_attn.q_proj, "self_attn.k_proj": layer.self_attn.k_proj}
        hessians, hidden = job._run(layer, linears, hidden, keywords)
        x = layer.input_layernorm(states).flatten(0, 1)
        torch.testing.assert_close(hessians["self_attn.q_proj"], x.T @ x, rtol=1e-3, atol=1e-2)
        assert hessians["self_attn.k_proj"] is hessians["self_attn.q_proj"]


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
def test_the_checkpoint_is_plain_rowint8_and_nearer_to_the_original(tmp_path, config_class):
    folder = write_tiny(tmp_path / "model", config_class)
    source = open_source(folder)
    write_checkpoint(source, tmp_path / "rtn", "rowint8", (), round_to_nearest(source.layers))
    calibrated, nearest = tensors_of(write_gptq(folder, tmp_path / "gptq")), tensors_of(tmp_path / "rtn")
    assert (tmp_path / "gptq" / "config.json").read_text() == (tmp_path / "rtn" / "config.json").read_text()
    assert calibrated.keys() == nearest.keys()
    for name, tensor in nearest.items():
        integers = name.removesuffix(".weight") in source.layers
        assert torch.equal(calibrated[name], tensor) != integers, name
        assert (calibrated[name].dtype, calibrated[name].shape) == (tensor.dtype, tensor.shape)
    model = Fidelity(folder, original(source), random_windows(24, seed=2))
    kl = [model.score(s).kl for s in (stored_setup(tmp_path / "gptq"), rounded_setup(source, "rowint8"))]
    gain = kl[1] - kl[0]
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5, "random tokens leave little to gain, but more than chance"


def test_rotated_rows_are_rounded_for_rotated_inputs(tmp_path):
    torch.manual_seed(0)
    mix, weight = torch.randn(50, 192), torch.randn(48, 192)
    seen, fresh = (torch.randn(4000, 50) @ mix + 0.1 * torch.randn(4000, 192) for _ in range(2))
    by = job.compensation(job._rotate_hessian(seen.T @ seen, 64))
    rounded, nearest = job.round_compensated(rotate(weight, 64), by), quantize_rowwise(weight, block=64)
    assert torch.equal(rounded.scale, nearest.scale)
    errors = [((rotate(dequantize(w), 64) - weight) @ fresh.T).norm() for w in (rounded, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_a_rotated_checkpoint_is_nearer_to_the_original(tmp_path):
    folder = write_tiny(tmp_path / "model", LlamaConfig)
    source = open_source(folder)
    stored = stored_setup(write_gptq(folder, tmp_path / "gptq", rotation=256))
    model = Fidelity(folder, original(source), random_windows(24, seed=2))
    gain = model.score(rounded_setup(source, "rowint8-a8")).kl - model.score(stored).kl
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_the_small_engine_holds_the_stored_integers(tmp_path):
    out = write_gptq(write_tiny(tmp_path / "model"), tmp_path / "gptq")
    engine = Engine(EngineConfig(str(out), device="cpu"))
    held = [part for part in engine.model.buffers() if part.dtype == torch.int8]
    stored = tensors_of(out)
    for layer in range(3):
        down = stored[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert sum(part.shape == down.shape and torch.equal(part, down) for part in held) == 1


def test_ignored_layers_stay_as_they_are(tmp_path):
    folder, ignored = write_tiny(tmp_path / "model", dtype=torch.bfloat16), "model.layers.1.mlp.down_proj"
    written = tensors_of(write_gptq(folder, tmp_path / "gptq", [ignored]))
    assert torch.equal(written[f"{ignored}.weight"], tensors_of(folder)[f"{ignored}.weight"])
    assert written["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj\.weight: row 2 holds NaN or Inf"),
        ("model.embed_tokens.weight", r"layers\.0\.self_attn\.q_proj: its inputs on the calibration text hold NaN"),
    ],
)
def test_broken_weights_are_named(tmp_path, tensor, message):
    folder = write_tiny(tmp_path / "model", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor][2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvalError, match=message):
        write_gptq(folder, tmp_path / "gptq")


@pytest.mark.parametrize(
    ("config_class", "options"),
    [(NemotronConfig, {}), (ArceeConfig, {}), (GPTNeoXConfig, {}), (PhiConfig, {"tie_word_embeddings": False})],
)
def test_layers_without_a_gate_and_norms_of_bf16_are_calibrated(tmp_path, config_class, options):
    folder = write_tiny(tmp_path / "model", config_class, dtype=torch.bfloat16, **options)
    written = tensors_of(write_gptq(folder, tmp_path / "gptq"))
    layers = open_source(folder).layers
    assert all(written[f"{layer}.weight"].dtype == torch.int8 for layer in layers)
    assert len(layers) >= 8


@pytest.mark.parametrize("config_class", [FalconH1Config, XGLMConfig])
def test_layers_that_take_or_return_more_than_states_are_refused(tmp_path, config_class):
    more = dict(d_model=64, ffn_dim=96, attention_heads=4, num_layers=2) if config_class is XGLMConfig else {}
    folder = write_tiny(tmp_path / "model", config_class, **more)
    source = open_source(folder)
    with pytest.raises(EvalError, match=r"cannot run the model's layers one by one .*; use --method rtn") as caught:
        job.calibrate(source, source.layers, WINDOWS)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_list_of_layers_is_refused(tmp_path):
    folder = write_tiny(tmp_path / "model", OPTConfig, ffn_dim=96, word_embed_proj_dim=64, tie_word_embeddings=False)
    source = open_source(folder)
    with pytest.raises(EvalError, match="does not know the layers of OPTForCausalLM; use --method rtn"):
        job.calibrate(source, source.layers, WINDOWS)


def test_the_command(smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    folder, text, out = write_tiny(tmp_path / "model", vocab_size=len(tokenizer)), tmp_path / "a.txt", tmp_path / "out"
    tokenizer.save_pretrained(folder)
    command = [console_script("rowint8"), "quantize", str(folder), str(out), "--method", "gptq"]
    text.write_text("Short. ")
    for options, message in (
        ([], "--method gptq and --calibration TEXT need each other"),
        (["--calibration", str(text)], "less than one window of 128"),
        (["--calibration", str(tmp_path / "none.txt")], "cannot read"),
    ):
        bad = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)
        assert message in bad.stderr
        assert not out.exists()
    text.write_text(" ".join(f"{number} boats left before dawn." for number in range(4000)))
    done = subprocess.run([*command, "--calibration", str(text)], capture_output=True, text=True, check=True)
    assert "21 linear layers in INT8" in done.stdout
    assert tensors_of(out)["model.layers.2.mlp.up_proj.weight"].dtype == torch.int8
