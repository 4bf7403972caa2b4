"""Guards around a whole model: what a checkpoint lacks, holds twice, or holds in INT8 where vLLM wants none of it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MixtralConfig, PhiConfig

from tests.vllm_plugin.harness import TINY, edited_copy, make_tiny, options, prequantized

pytest.importorskip("vllm")

from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rowint8.vllm_plugin import guard as guard_module
from rowint8.vllm_plugin import logits as logits_module
from rowint8.vllm_plugin.guard import ModelGuard, check_reload
from rowint8.vllm_plugin.loading import Int8Method
from rowint8.vllm_plugin.logits import EVERY, LogitsWatch
from rowint8.vllm_plugin.shards import INDEX, files_of_repeated, refuse_other_rows

MODELS = {
    "llama": (LlamaConfig, {}),
    "phi": (PhiConfig, {"intermediate_size": 4 * 64, "num_key_value_heads": 2}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
LACKING = [
    ("llama", "model.norm.weight"),
    ("llama", "model.embed_tokens.weight"),
    ("phi", "model.layers.1.input_layernorm.bias"),
    ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
]
DOWN = "model.layers.1.mlp.down_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny(folder / name, config_class, **shape) for name, (config_class, shape) in MODELS.items()}


@pytest.mark.vllm
@pytest.mark.parametrize(("model", "name"), LACKING)
def test_a_checkpoint_without_a_part_is_refused_by_name(driver, models, tmp_path, model, name):
    error = driver.fails(edited_copy(models[model], tmp_path / "less", lambda tensors: tensors.pop(name)))
    assert f"the checkpoint lacks {name}; fetch the model again" in error


@pytest.mark.vllm
def test_whoever_wants_the_rest_gets_it(driver, models, tmp_path):
    folder = edited_copy(models["llama"], tmp_path / "less", lambda tensors: tensors.pop("model.norm.weight"))
    driver.works(folder, llm=TINY | {"model_loader_extra_config": {"enable_weights_track": False}})


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.self_attn.o_proj"])
def test_int8_numbers_where_vllm_computes_unquantized_are_refused_by_name(driver, models, tmp_path, name):
    also = () if name.endswith("_proj") else (f"{name}.weight",)
    folder = prequantized(models["llama"], tmp_path / "more", also=also)
    config = {"quant_method": "rowint8", "ignore": [name]}
    error = driver.fails(folder, llm=TINY | {"hf_overrides": {"quantization_config": config}, "quantization": None})
    assert f"{name}.weight: the checkpoint holds this layer in INT8" in error
    assert f"--ignore {name}" in error


def without(source, folder, name):
    return edited_copy(source, folder, lambda tensors: tensors.pop(name))


@pytest.mark.vllm
@pytest.mark.parametrize("name", [DOWN, NORM])
def test_a_reload_without_a_part_is_refused_by_name(driver, models, tmp_path, name):
    error = driver.fails(models["llama"], reload=str(without(models["llama"], tmp_path / "less", name)))
    assert name.removesuffix(".weight") in error
    assert "the reload gives nothing for" in error or "the checkpoint lacks" in error


def with_other(source, folder, *names):
    """A copy with an overlay that holds other numbers for these tensors. Returns them."""
    other = {name: tensor.flip(0) for name, tensor in load_file(source / "model.safetensors").items() if name in names}
    edited_copy(source, folder, lambda tensors: None)
    save_file(other, folder / "a-overlay.safetensors", metadata={"format": "pt"})
    return other


def write_index(folder, weight_map: dict) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.vllm
def test_of_a_tensor_in_two_files_the_one_counts_that_the_index_names(driver, models, tmp_path):
    source, folder = models["llama"], tmp_path / "two"
    other = with_other(source, folder, DOWN, Q, NORM)
    indexed = dict.fromkeys(load_file(source / "model.safetensors"), "model.safetensors")
    write_index(folder, indexed | dict.fromkeys(other, "a-overlay.safetensors"))
    expected = driver.works(edited_copy(source, tmp_path / "one", lambda tensors: tensors.update(other)))
    assert driver.works(folder) == expected
    assert driver.log.read_text().count(f"{DOWN} stands in a-overlay.safetensors and in model.safetensors") == 1


@pytest.mark.vllm
def test_logits_that_are_nan_are_warned_of_once(driver, models, tmp_path):
    folder = edited_copy(models["llama"], tmp_path / "nan", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": -1e9}))
    driver.run(folder, sampling={"temperature": 0.0, "max_tokens": 2 * EVERY, "ignore_eos": True})
    assert driver.log.read_text().count("logits are NaN, so the tokens mean nothing") == 1


@pytest.mark.parametrize("names", [[DOWN], [Q, NORM], ["lm_head.weight"]])
def test_without_an_index_a_tensor_in_two_files_is_refused_by_name(models, tmp_path, names):
    with_other(models["llama"], tmp_path / "two", *names)
    with pytest.raises(ValueError, match="remove the files that do not belong") as error:
        files_of_repeated(tmp_path / "two")
    assert f"{sorted(names)[0]} stands in a-overlay.safetensors and in model.safetensors" in str(error.value)


def test_files_that_the_index_does_not_name_are_no_second_place(models, tmp_path):
    other = with_other(models["llama"], tmp_path / "two", DOWN)
    write_index(tmp_path / "two", dict.fromkeys(load_file(models["llama"] / "model.safetensors"), "model.safetensors"))
    assert files_of_repeated(tmp_path / "two") == {}
    assert list(other) == [DOWN]
    assert files_of_repeated(models["llama"]) == {}
    assert files_of_repeated(None) == {}


OTHER_ROWS = [(None, 256), (None, 16), (256, None), (256, 64), (16, 256)]
"""How a checkpoint's rows are rotated, and how an edited config or a reload takes them."""


@pytest.mark.parametrize(("stored", "asked"), OTHER_ROWS)
def test_rows_that_are_rotated_otherwise_than_asked_are_refused(models, tmp_path, stored, asked):
    folder = prequantized(models["llama"], tmp_path / "int8", largest_block=stored)
    with pytest.raises(ValueError, match=r"model\.safetensors: its rows .*, and the config asks for rows that"):
        refuse_other_rows(folder, asked)
    refuse_other_rows(folder, stored)
    refuse_other_rows(models["llama"], asked)


@pytest.mark.vllm
@pytest.mark.parametrize(("stored", "asked"), OTHER_ROWS[1:4])
def test_an_edited_config_does_not_rotate_rows(driver, models, tmp_path, stored, asked):
    folder = prequantized(models["llama"], tmp_path / "int8", largest_block=stored)
    other = prequantized(models["llama"], tmp_path / "other", largest_block=asked)
    assert "its rows" in driver.fails(folder, llm=TINY | {"quantization": None}, reload=str(other))
    (folder / "config.json").write_text((other / "config.json").read_text())
    assert "its rows" in driver.fails(folder, llm=TINY | {"quantization": None})


class Tiny(torch.nn.Module):
    """An INT8 layer, a plain one, a norm, and a head that shares the embedding's weight."""

    def __init__(self, answers: bool = True) -> None:
        super().__init__()
        self.embed, self.plain, self.norm, self.int8, self.head = (torch.nn.Module() for _ in range(5))
        for layer in (self.embed, self.plain, self.norm, self.int8):
            layer.weight = torch.nn.Parameter(torch.zeros(2))
        self.plain.bias = torch.nn.Parameter(torch.zeros(2))
        self.head.weight = self.embed.weight
        self.int8.quant_method = Int8Method()
        self.answers = answers

    def load_weights(self, weights):
        names, parameters = set(), dict(self.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            parameters[name].weight_loader(parameters[name], tensor)
            names.add(name)
        return names if self.answers else None


ALL = ["embed.weight", "plain.weight", "plain.bias", "norm.weight"]


def given(*names: str, dtype=torch.float32) -> list:
    return [(name, torch.ones(2, dtype=dtype)) for name in names]


@pytest.mark.parametrize("lacking", ALL)
def test_every_kind_of_parameter_is_missed(lacking):
    model = Tiny()
    ModelGuard(model, tracked=True, is_draft=False)
    with pytest.raises(ValueError, match=f"the checkpoint lacks {lacking};"):
        model.load_weights(given(*(name for name in ALL if name != lacking)))


def test_a_shared_weight_counts_under_either_name_and_int8_layers_answer_for_themselves():
    for first in ("embed.weight", "head.weight"):
        model = Tiny()
        ModelGuard(model, tracked=True, is_draft=False)
        assert model.load_weights(given(first, *ALL[1:])) == {first, *ALL[1:]}
        assert model.plain.bias.tolist() == [1, 1]


def test_later_parts_of_a_reload_and_models_that_do_not_say_are_not_judged():
    model = Tiny()
    ModelGuard(model, tracked=True, is_draft=False)
    model.load_weights(given(*ALL))
    assert model.load_weights(given("norm.weight")) == {"norm.weight"}
    silent = Tiny(answers=False)
    ModelGuard(silent, tracked=True, is_draft=False)
    assert silent.load_weights(given("norm.weight")) is None


@pytest.mark.parametrize("lacking", ["int8", "norm"])
def test_a_reload_must_give_all_weights_in_whatever_pieces(monkeypatch, lacking):
    model = Tiny()
    monkeypatch.setitem(guard_module._GUARDS, model, ModelGuard(model, tracked=True, is_draft=False))
    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.kernel_tensors, info.load_numel_total, info.load_numel = ({}, {}), 2, 2 * (lacking != "int8")
    names = [name for name in ALL if not name.startswith(lacking)]
    for name in names:
        model.load_weights(given(name))
    with pytest.raises(ValueError, match=f"{lacking}"):
        check_reload(model)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_outside_int8_layers_refuses_int8(name):
    model = Tiny()
    ModelGuard(model, tracked=True, is_draft=False)
    with pytest.raises(ValueError, match=f"{name}: the checkpoint holds this layer in INT8"):
        model.load_weights(given(name, dtype=torch.int8))


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.float16, "float16 ends at 65504"), (torch.bfloat16, "is at fault")]
)
def test_the_watch_warns_once_and_names_dtypes_that_would_do(monkeypatch, dtype, advice):
    lines = []
    monkeypatch.setattr(logits_module.logger, "warning", lambda text, *values: lines.append(text % values))
    watch, model = LogitsWatch(dtype), torch.nn.Module()
    logits = torch.zeros(3, 5)
    model.compute_logits = lambda: logits
    watch.install(model)
    for _ in range(EVERY):
        assert model.compute_logits() is logits
    assert lines == []
    logits[2] = math.nan
    for _ in range(3 * EVERY):
        model.compute_logits()
    assert len(lines) == 1
    assert advice in lines[0]
    assert "VLLM_COMPUTE_NANS_IN_LOGITS" in lines[0]


def test_models_without_logits_are_let_be():
    model = torch.nn.Module()
    LogitsWatch(torch.bfloat16).install(model)
    assert not hasattr(model, "compute_logits")


@pytest.mark.vllm
def test_unquantized_experts_and_ignored_layers_are_not_taken_for_missing(driver, models):
    ignored = options(ignore=["re:.*experts", "re:.*o_proj", "re:.*self_attn.(q|k|v)_proj"])
    result = driver.works(models["mixtral"], llm=ignored)
    assert {layer["method"] for layer in result["layers"].values()} & {"RowInt8LinearMethod"} == set()
