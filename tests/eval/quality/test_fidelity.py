"""`rowint8 fidelity`: its numbers against plain definitions, on tiny models and text written here."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from rowint8.eval.errors import EvalError
from rowint8.eval.processes import console_script
from rowint8.eval.quality import fidelity as job
from rowint8.eval.quality import fidelity_setups as setups
from rowint8.eval.quantize import checkpoint as quantize_checkpoint
from rowint8.eval.quantize.source import open_source
from rowint8.eval.quantize.text import read_text, token_windows
from rowint8.eval.results.files import read_results
from rowint8.kernels.activations import quantize_tokens, rotate, rotation_block
from rowint8.kernels.quantize import dequantize, quantize_rowwise

SENTENCE = "A boat left the harbour before dawn, and nobody on the quay could say who had taken it. "


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        vocab_size=300,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=request.param,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


WINDOWS = torch.randint(0, 300, (3, 150), generator=torch.Generator().manual_seed(1))


def logits_of(folder, change=lambda name, tensor: tensor):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter))
        return model(WINDOWS).logits[:, :-1].flatten(0, 1).double()


def int8(part):
    def change(name, tensor):
        return dequantize(quantize_rowwise(tensor)) if part in name and tensor.dim() == 2 else tensor

    return change


def expected(folder, change):
    """KL, nll and same-top-1 of every predicted token by the definitions, in fp64."""
    logp, logq = logits_of(folder).log_softmax(-1), logits_of(folder, change).log_softmax(-1)
    kl = torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    nll = torch.nn.functional.nll_loss(logq, WINDOWS[:, 1:].flatten(), reduction="none")
    return kl, nll, logp.argmax(-1) == logq.argmax(-1)


def scores_of(folder, setup):
    source = open_source(folder)
    return job.Fidelity(folder, setups.original(source), WINDOWS).score(setup(source))


def assert_scores(scores, expected):
    kl, nll, same = expected
    torch.testing.assert_close(scores.kl, kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.nll, nll, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.same_top1, same)


def test_scores_follow_the_definitions(folder):
    scores = scores_of(folder, lambda source: setups.rounded_setup(source, "rowint8"))
    assert_scores(scores, expected(folder, int8("_proj")))
    torch.testing.assert_close(scores.reference_nll, expected(folder, lambda n, t: t)[1], rtol=1e-4, atol=1e-5)
    assert scores.kl.mean() > 1e-5


def test_the_output_layer_takes_a_tied_embedding_along(folder):
    scores = scores_of(folder, lambda source: setups.rounded_setup(source, "rowint8+lm_head"))
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]

    def change(name, tensor):
        rounded = "_proj" in name or "lm_head" in name or (tied and "embed_tokens" in name)
        return dequantize(quantize_rowwise(tensor)) if rounded else tensor

    assert_scores(scores, expected(folder, change))


def test_ablation_rounds_one_kind_at_a_time(folder):
    source = open_source(folder)
    ablation = {setup.name: setup for setup in setups.ablation_setups(source)}
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(ablation) == sorted(f"only {kind}" for kind in [*kinds, "lm_head"])
    model = job.Fidelity(folder, setups.original(source), WINDOWS)
    model.score(ablation["only up_proj"])
    assert_scores(model.score(ablation["only down_proj"]), expected(folder, int8("down_proj")))


def test_int8_activations_round_the_inputs_of_every_layer(folder):
    """Against transformers with layers that round rotated operands, the output layer too."""
    scores = scores_of(folder, lambda source: setups.rounded_setup(source, "rowint8-a8+lm_head"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied, rotated = model.config.tie_word_embeddings, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            block = rotation_block(module.in_features)
            rotated[name] = rotate(dequantize(quantize_rowwise(module.weight.data, block=block)), block)
            module.register_forward_pre_hook(lambda _, given, block=block: (int8_tokens(given[0], block),))
    with torch.inference_mode():
        for name, weight in rotated.items():
            model.get_submodule(name).weight.copy_(weight)
        logits = model(WINDOWS).logits[:, :-1].flatten(0, 1).double()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    logp, logq = logits_of(folder).log_softmax(-1), logits.log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    assert (scores.kl - kl).abs().mean() < 0.05 * kl.mean()


def int8_tokens(x, block):
    q, scale = quantize_tokens(x, block)
    return rotate(q.float() * scale[..., None], block)


def test_what_a_setup_rounds_is_not_rounded_in_the_next(folder):
    source = open_source(folder)
    model = job.Fidelity(folder, setups.original(source), WINDOWS)
    plain = model.score(setups.rounded_setup(source, "rowint8")).kl
    assert not torch.equal(model.score(setups.rounded_setup(source, "fp8-a8")).kl, plain)
    assert torch.equal(model.score(setups.rounded_setup(source, "rowint8")).kl, plain)


def test_smaller_blocks_and_ablations_have_names(folder):
    source = open_source(folder)
    assert setups.choose(["rowint8-a8-64", "rowint8-a8-1"]) == ["rowint8-a8-64", "rowint8-a8-1"]
    assert torch.equal(setups.round_rotated_rows(torch.eye(48), 1), setups.round_rowint8(torch.eye(48)))
    names = [setup.name for setup in setups.ablation_setups(source, "rowint8-a8")]
    assert "only q_proj, rowint8-a8" in names
    assert names[-1] == "only lm_head, rowint8-a8"


def test_a_stored_checkpoint_for_int8_activations_scores_as_rounding_does(folder, tmp_path):
    source = open_source(folder)
    convert = quantize_checkpoint.round_to_nearest(source.layers, 256)
    quantize_checkpoint.write_checkpoint(source, tmp_path / "a8", "rowint8", (), convert, rotation=256)
    stored = scores_of(folder, lambda source: setups.stored_setup(tmp_path / "a8"))
    rounded = scores_of(folder, lambda source: setups.rounded_setup(source, "rowint8-a8"))
    assert torch.equal(stored.kl, rounded.kl)
    config = (tmp_path / "a8" / "config.json").read_text()
    (tmp_path / "a8" / "config.json").write_text(config.replace('"rotation_block": 256', '"rotation_block": 7'))
    with pytest.raises(EvalError, match="has activations and rotation_block as"):
        setups.stored_setup(tmp_path / "a8")


def test_unchanged_weights_cost_nothing(folder):
    scores = scores_of(folder, lambda source: setups.WeightSet("same", setups.original(source)))
    assert scores.kl.abs().max() == 0
    assert torch.equal(scores.nll, scores.reference_nll)
    assert scores.same_top1.all()


def test_a_stored_checkpoint_scores_as_rounding_does(folder, tmp_path):
    source = open_source(folder)
    convert = quantize_checkpoint.round_to_nearest(source.layers)
    quantize_checkpoint.write_checkpoint(source, tmp_path / "int8", "rowint8", (), convert)
    stored = scores_of(folder, lambda source: setups.stored_setup(tmp_path / "int8"))
    rounded = scores_of(folder, lambda source: setups.rounded_setup(source, "rowint8"))
    assert torch.equal(stored.kl, rounded.kl)
    with pytest.raises(EvalError, match="is no rowint8 checkpoint"):
        setups.stored_setup(folder)


def lacks_a_layer(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight_scale"]


def has_a_third_layer(tensors):
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(64)


def lacks_scales(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]


def is_narrower(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:, :1].contiguous()


def has_few_scales(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_scale"] = tensors["model.layers.1.mlp.up_proj.weight_scale"][:1].clone()


def has_no_finite_norm(tensors):
    tensors["model.norm.weight"][0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks_a_layer, "stored lacks model.layers.1.mlp.up_proj.weight, unlike the model"),
        (has_a_third_layer, "stored has model.layers.2.input_layernorm.weight, unlike the model"),
        (lacks_scales, r"stored: model.layers.1.mlp.up_proj.weight is int8 \[96, 64\]"),
        (is_narrower, r"up_proj.weight is float32 \[96, 1\]; the model's is a float \[96, 64\]"),
        (has_few_scales, "up_proj.weight and its scales are no rowint8 weight"),
        (has_no_finite_norm, "stored: the logits on this text are NaN"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_is_refused(folder, tmp_path, change, message):
    source, out = open_source(folder), tmp_path / "stored"
    convert = quantize_checkpoint.round_to_nearest(source.layers)
    quantize_checkpoint.write_checkpoint(source, out, "rowint8", (), convert)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    model = job.Fidelity(folder, setups.original(source), WINDOWS)
    with pytest.raises(EvalError, match=message) as caught:
        model.score(setups.stored_setup(out))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_measured_is_refused(folder):
    source = open_source(folder)
    with pytest.raises(EvalError, match="one predicted token has no spread"):
        job.Fidelity(folder, setups.original(source), WINDOWS[:1, :2])
    tensors = load_file(folder / "model.safetensors")
    has_no_finite_norm(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvalError, match="the model's logits are NaN or infinite"):
        job.Fidelity(folder, setups.original(source), WINDOWS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 31}))
    with pytest.raises(EvalError, match="has 31 positions, less than a window of 32"):
        token_windows(folder, SENTENCE, 32, 1)


def test_reference_roundings():
    weight = torch.randn(5, 70)
    fp8 = setups.round_fp8_row(weight)
    assert ((fp8 - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 * 2**-10).all()
    assert not torch.equal(fp8, weight)
    grouped = setups.round_group32(weight)
    for columns in (slice(0, 32), slice(32, 64), slice(64, 70)):
        assert torch.equal(grouped[:, columns], setups.round_rowint8(weight[:, columns].contiguous()))
    assert (setups.round_fp8_row(torch.zeros(2, 3)) == 0).all()


def test_rows_sum_up_the_tokens():
    kl = torch.arange(1, 101).double() / 100
    nll, reference = torch.full((100,), 2.0).double(), torch.cat((torch.ones(50), torch.zeros(50))).double()
    row = job.fidelity_row("s", job.TokenScores(kl, nll, reference, kl > 0.25), "t", 8)
    assert (row.tokens, row.kl_mean, row.kl_max) == (100, pytest.approx(0.505), 1.0)
    assert row.kl_p99 == pytest.approx(0.9901)
    assert row.same_top1 == pytest.approx(0.75)
    assert row.perplexity == pytest.approx(7.389056, rel=1e-6)
    assert row.nll_difference == pytest.approx(1.5)
    assert row.nll_difference_stderr == pytest.approx(0.05025189, rel=1e-6)


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("plain\n")
    assert read_text(tmp_path / "a.txt") == "plain\n"
    (tmp_path / "a.jsonl").write_text('{"page": "one "}\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.jsonl") == "one two"
    (tmp_path / "b.jsonl").write_text('{"other": 1}\n')
    for name in ("b.jsonl", "none.txt"):
        with pytest.raises(EvalError, match=f"cannot read .*{name}"):
            read_text(tmp_path / name)


def test_the_command(smollm2, tmp_path):
    text, result = tmp_path / "boat.txt", tmp_path / "out.json"
    text.write_text(SENTENCE * 4)
    options = ["--model", str(smollm2), "--text", str(text), "--window", "32", "--windows", "2"]
    command = [console_script("rowint8"), "fidelity", *options, "--quantization", "rowint8", "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "62 tokens in windows of 32" in done.stdout
    rows = {row.setup: row for row in read_results(result).rows}
    assert rows["unquantized"].kl_max == 0
    assert 1e-4 < rows["rowint8"].kl_mean < 1e-2
    for wrong, message in (("int3", "accepted are rowint8"), ("bf16", "less than one window")):
        bad = subprocess.run(
            [*command[:-4], "--quantization", wrong, "--window", "4000"], capture_output=True, text=True, check=False
        )
        assert bad.returncode == 1
        assert message in bad.stderr


def test_an_architecture_with_other_logits_is_refused(folder):
    source = open_source(folder)
    model = job.Fidelity(folder, setups.original(source), WINDOWS)
    plain = model.model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    model.model.forward = capped
    with pytest.raises(EvalError, match="changes its logits"):
        model._check_head()
