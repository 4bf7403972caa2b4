"""How the vLLM plugin reads checkpoints: pre-quantized, a second time, and damaged ones that it must refuse."""

import pytest
import torch
from transformers import Qwen2Config

from tests.vllm_plugin.harness import (
    PROMPTS,
    TINY,
    assert_follows,
    edited_copy,
    make_tiny,
    options,
    oracle,
    prequantized,
    with_other_numbers,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.newest
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


def test_other_weights_are_reloaded_into_the_same_memory(driver, tiny, online, tmp_path):
    result = driver.works(with_other_numbers(tiny, tmp_path / "other"), reload=str(tiny))
    assert result.pop("same_memory") is True
    assert result == online


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
    "zero scale": (put(OS, 9, 0.0), f"{OUT}.weight_scale: row 9 is 0.0, no scale of a row that is not zeros"),
    "zero scales of a part": (lambda t: t[QS].zero_(), f"{QKV}.weight_scale: row 0 is 0.0, no scale of a row that"),
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
    error = driver.fails(tiny, llm=options(ignored=["lm_head"]))
    assert "rowint8: unknown option ignored; accepted are quant_method, ignore, activations, rotation_block, " in error
    assert "float64" in driver.fails(tiny, llm={**TINY, "dtype": "float64"})
