"""INT8 activations in vLLM: which graphs the passes rewrite, what a layer holds, and what the real engine says."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from rowint8.kernels import ops
from rowint8.kernels.activations import rotate, rotation_block
from rowint8.kernels.quantize import dequantize, quantize_rowwise
from rowint8.vllm_plugin import compat
from rowint8.vllm_plugin import config as config_module
from rowint8.vllm_plugin.config import RowInt8Config
from rowint8.vllm_plugin.linear import RowInt8LinearMethod
from rowint8.vllm_plugin.norm_fusion import NormFusion
from rowint8.vllm_plugin.passes import Passes
from rowint8.vllm_plugin.swiglu_fusion import SwigluFusion
from tests.vllm_plugin.harness import (
    A8,
    FLIPS,
    PROMPTS,
    TINY,
    make_tiny,
    options,
    prequantized,
    with_other_numbers,
)
from tests.vllm_plugin.test_norm_fusion import by_torch
from tests.vllm_plugin.test_sequences import operators_of
from tests.vllm_plugin.vllm_driver import describe

K, I, BLOCK = 32, 48, 32


class Recorder(Passes):
    """All passes, which remember the operators of the graph that they left."""

    def __call__(self, graph):
        super().__call__(graph)
        self.operators = operators_of(graph)


def compiled(function, *given) -> tuple:
    """The output of `function` compiled with the passes, and the operators that were left."""
    torch._dynamo.reset()
    recorder = Recorder()
    recorder.norm, recorder.swiglu = NormFusion(given[0].dtype), SwigluFusion(given[0].dtype, [(2 * I, K)])
    settings = {"post_grad_custom_post_pass": recorder, "enable_auto_functionalized_v2": False, "fx_graph_cache": False}
    return torch.compile(function, options=settings)(*given), recorder.operators


def inputs(dtype=torch.bfloat16) -> tuple:
    draw = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, K, generator=draw).to(dtype)
    return x, residual, torch.randn(K, generator=draw).to(dtype)


WEIGHTS = {
    rows: quantize_rowwise(torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)), block=BLOCK)
    for rows in (8, 24, 2 * I)
}


def layer(x: torch.Tensor, rows: int) -> torch.Tensor:
    return ops.linear_int8(*ops.quantize_tokens(x, BLOCK), *WEIGHTS[rows], None, x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return silu(x[..., :I]) * x[..., I:]


def test_layers_that_read_the_same_tokens_round_them_once():
    x = inputs()[0]
    got, operators = compiled(lambda x: (layer(x, 8), layer(x, 24)), x)
    assert sorted(operators) == ["linear_int8", "linear_int8", "quantize_tokens"]
    torch.testing.assert_close(got, (layer(x, 8), layer(x, 24)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_up_and_silu_and_mul_become_one_product(dtype):
    x = inputs(dtype)[0]
    out, operators = compiled(lambda x: silu_and_mul(layer(x, 2 * I)), x)
    assert operators == ["quantize_tokens", "swiglu_int8"]
    expected = ops.swiglu_int8(*ops.quantize_tokens(x, BLOCK), *WEIGHTS[2 * I], dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_a_norm_hands_out_int8_and_the_sum():
    def block(x, residual, norm):
        normed, total = by_torch(x, residual, norm)
        return layer(normed, 24), total

    given = inputs()
    got, operators = compiled(block, *given)
    assert operators == ["add_rms_norm_int8", "linear_int8"]
    normed, total = ops.add_rms_norm(*given, 1e-5)
    torch.testing.assert_close(got, (layer(normed, 24), total), rtol=0, atol=0)


def test_the_last_norm_has_no_sum_that_is_read():
    given = inputs()
    got, operators = compiled(lambda *given: layer(by_torch(*given)[0], 24), *given)
    assert operators == ["add_rms_norm_int8", "linear_int8"]
    torch.testing.assert_close(got, layer(ops.add_rms_norm(*given, 1e-5)[0], 24), rtol=0, atol=0)


def test_two_layers_behind_a_norm_share_what_it_hands_out():
    def block(x, residual, norm):
        normed, _ = by_torch(x, residual, norm)
        return layer(normed, 24), layer(normed, 8)

    operators = compiled(block, *inputs())[1]
    assert sorted(operators) == ["add_rms_norm_int8", "linear_int8", "linear_int8"]


def test_an_adapter_reads_what_was_normed_before_it_is_rounded():
    def block(x, residual, norm):
        normed, total = by_torch(x, residual, norm)
        return layer(normed, 24) + normed @ torch.ones(K, 24, dtype=normed.dtype), total

    assert compiled(block, *inputs())[1] == ["add_rms_norm", "quantize_tokens", "linear_int8"]


def test_options_that_change_the_graph_change_the_key_of_the_compile_cache():
    keys = {
        Passes(RowInt8Config(**chosen).options()).uuid()
        for chosen in ({}, A8, {"rotation_block": 64}, {"ignore": ["a"]})
    }
    assert len(keys) == 4
    assert Passes(RowInt8Config().options()).uuid() in keys


def test_a_card_without_fast_int8_stays_weight_only_and_says_so(monkeypatch):
    lines = []
    b300 = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: (10, 3))
    monkeypatch.setattr(config_module, "current_platform", b300)
    monkeypatch.setattr(config_module.logger, "warning_once", lines.append)
    config = RowInt8Config(**A8)
    config.maybe_update_config("none")
    assert config.activations is None
    assert lines == ["rowint8: activations are not rounded to INT8: on this card its tensor cores are slow in INT8"]


def test_batch_invariance_needs_int8_activations(monkeypatch):
    monkeypatch.setattr(compat, "batch_invariant", lambda: True)
    RowInt8Config(**A8).maybe_update_config("none")
    with pytest.raises(ValueError, match='sums depend on the number of tokens; set "activations": "int8"'):
        RowInt8Config().maybe_update_config("none")


@pytest.mark.parametrize(
    ("stored", "chosen", "message"),
    [
        ({}, {}, None),
        (A8, A8, None),
        (A8 | {"rotation_block": 64}, A8 | {"rotation_block": 64}, None),
        (A8, {}, "the checkpoint has activations 'int8', the options say None"),
        ({}, A8, "the checkpoint has activations None, the options say 'int8'"),
        (A8 | {"rotation_block": 64}, A8, "the checkpoint has rotation_block 64, the options say 256"),
    ],
)
def test_a_checkpoint_and_options_that_disagree_are_refused(tmp_path, stored, chosen, message):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "rowint8", **stored}}))
    config = RowInt8Config.from_config({"quant_method": "rowint8", **chosen})
    if message is None:
        return config.maybe_update_config(str(tmp_path))
    with pytest.raises(ValueError, match="rowint8") as error:
        config.maybe_update_config(str(tmp_path))
    assert message in str(error.value)


def test_a_part_of_the_columns_that_cuts_a_block_is_refused():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        method = RowInt8LinearMethod("model.o_proj", RowInt8Config(**A8))
    assert (method._rotation_block(512, 256), method._rotation_block(160, 160)) == (256, 32)
    with pytest.raises(ValueError, match=r"model\.o_proj: a rank holds 128 of 512 columns") as error:
        method._rotation_block(512, 128)
    assert str(error.value).endswith('rotated blocks of 256; take fewer ranks, or "rotation_block": 128')


class RoundedLinear(torch.nn.Module):
    """A linear layer with INT8 weights and activations, through the operators."""

    def __init__(self, linear: torch.nn.Linear, block: int) -> None:
        super().__init__()
        self.block, self.bias = block, linear.bias
        self.rounded = quantize_rowwise(linear.weight.data, block=block)

    def forward(self, x):
        return ops.linear_int8(*ops.quantize_tokens(x, self.block), *self.rounded, self.bias, x.dtype)


def oracle(folder, lm_head: bool = False):
    """The transformers model with INT8 weights and activations in all linear layers, and in a tied head where asked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and (name != "lm_head" or lm_head):
            model.set_submodule(name, RoundedLinear(module, rotation_block(module.in_features)))
    if lm_head:
        embed_tokens = model.get_input_embeddings().weight.data
        block = rotation_block(embed_tokens.shape[1])
        embed_tokens.copy_(rotate(dequantize(quantize_rowwise(embed_tokens, block=block)), block))
    return model


def assert_says(result: dict, model) -> None:
    """Log-probabilities of prompt and tokens are those of the model, but for activations that round the other way."""
    rows = zip(PROMPTS, result["token_ids"], result["prompt_logprobs"], result["logprobs"], strict=True)
    for prompt, tokens, prompt_logprobs, logprobs in rows:
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + tokens[:-1]])).logits[0].log_softmax(-1)
        reported = prompt_logprobs + logprobs
        for row, position in zip(expected[-len(reported) :], reported, strict=True):
            assert position == pytest.approx({token: float(row[int(token)]) for token in position}, abs=FLIPS)


@pytest.fixture(scope="module")
def rounded(driver, tiny) -> dict:
    """What vLLM says with `tiny` and INT8 activations."""
    return driver.works(tiny, llm=options(**A8))


@pytest.mark.vllm
def test_it_says_what_the_operators_say(tiny, rounded, online):
    assert_says(rounded, oracle(tiny))
    assert rounded["logprobs"] != online["logprobs"]
    assert rounded["int8_calls"]["linear_int8"] == rounded["int8_calls"]["quantize_tokens"] > 0


@pytest.mark.vllm
def test_layers_hold_rotated_rows_and_their_block(tiny, rounded):
    tensors = load_file(tiny / "model.safetensors")
    for name, block in {"model.layers.1.mlp.down_proj": 32, "model.layers.0.self_attn.o_proj": 64}.items():
        values, scale = quantize_rowwise(tensors[f"{name}.weight"], block=block)
        held = {"weight": describe(values), "weight_scale": describe(scale)}
        held["rotation_block"] = describe(torch.tensor([block], dtype=torch.int32))
        assert rounded["layers"][name] == {"method": "RowInt8LinearMethod", **held}


@pytest.mark.vllm
def test_a_stored_checkpoint_a_reload_and_a_saved_state_are_the_same(driver, tiny, rounded, tmp_path):
    folder = prequantized(tiny, tmp_path / "int8", largest_block=256)
    assert driver.works(folder, llm={**TINY, "quantization": None}) == rounded
    other = with_other_numbers(tiny, tmp_path / "other")
    reloaded = driver.works(other, llm=options(**A8), reload=str(tiny))
    assert reloaded["same_memory"]
    assert reloaded["layers"] == rounded["layers"]
    assert reloaded["logprobs"] == rounded["logprobs"]
    saved = driver.saves_and_loads(tiny, tmp_path / "saved", llm=options(**A8))
    assert saved["logprobs"] == rounded["logprobs"]
    llm = {**options(), "load_format": "sharded_state"}
    assert "rotation_block" in driver.fails(tmp_path / "saved", llm=llm)


@pytest.mark.vllm
def test_a_tied_head_is_one_rotated_copy_that_a_lookup_rotates_back(driver, tmp_path):
    folder = make_tiny(tmp_path / "tied", tie_word_embeddings=True)
    result = driver.works(folder, llm=options(lm_head=True, **A8))
    assert result["layers"]["model.embed_tokens"]["weight"][0] == "torch.int8"
    assert_says(result, oracle(folder, lm_head=True))
