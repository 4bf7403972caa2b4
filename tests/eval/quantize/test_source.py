"""rowint8.eval.quantize.source: what a checkpoint may be; all else is refused in one line, and nothing is written."""

import io
import json
import os
import resource
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.checkpoint import round_to_nearest, write_checkpoint
from rowint8.eval.quantize.source import INDEX, open_source
from rowint8.eval.quantize.text import token_windows
from tests.eval.quantize.harness import (
    UP,
    assert_holds,
    edit_json,
    edit_tensors,
    places,
    refusal,
    write,
    write_original,
)
from tests.tiny_models import write_tiny

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def nested(depth):
    return "[" * depth + "]" * depth


NO_CONFIG = {
    "a list": "[1, 2]",
    "a string": '"llama"',
    "null": "null",
    "a number": "7",
    "nothing": "",
    "half of one": '{"model_type": "llama", ',
    "no UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "deep brackets": nested(100_000),
    "a deep object": '{"a": ' * 5000 + "1" + "}" * 5000,
    "a number of 5,000 digits": '{"hidden_size": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("case", NO_CONFIG)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_no_object_is_refused(model, case, name):
    content = NO_CONFIG[case]
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in refusal(model)


VALUES = {
    "num_hidden_layers": ["two", [2], {}, None, -1, 1_000_000, 10**30, 1e300, 2.5],
    "n_layer": [10**6],
    "num_labels": [10**9],
    "hidden_size": ["64", [64], None, -64, 10**18],
    "num_attention_heads": [0, -4, "4"],
    "vocab_size": [-1, 10**30, [128]],
    "model_type": [None, 7, [], "unknown", "../llama"],
    "hidden_act": [None, 3, "nonsense"],
    "rope_parameters": ["x", {"rope_type": "nonsense"}],
    "quantization_config": ["gptq", [1], {"quant_method": "fp8"}, {"quant_method": ["x"]}, 3],
    "architectures": [json.loads(nested(60))],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VALUES.items() for value in values])
def test_values_that_no_config_has_are_refused(model, key, value):
    edit_json(model / "config.json", lambda config: config.update({key: value}))
    start = time.monotonic()
    assert len(refusal(model)) < 500 + len(str(model))
    assert time.monotonic() - start < 20


WEIGHT_MAPS = [None, [], "x", 3, {}, {"a": None}, {"a": 1}, {"a": ["b"]}, {"a": {"b": "c"}}, {"a": SHARD, "b": 2}]
FILE_NAMES = [
    "../model/" + SHARD,
    "/etc/passwd",
    "a/../" + SHARD,
    "..",
    "",
    ".",
    "config.json",
    INDEX,
    "x.bin",
    "missing.safetensors",
    "nul\0.safetensors",
    "line\n.safetensors",
    "\ud800.safetensors",
    "n" * 300 + ".safetensors",
    "~/x.safetensors",
]


@pytest.mark.parametrize("weight_map", WEIGHT_MAPS, ids=str)
def test_an_index_without_names_of_files_is_refused(model, weight_map):
    edit_json(model / INDEX, lambda index: index.update(weight_map=weight_map))
    assert INDEX in refusal(model)


@pytest.mark.parametrize("name", FILE_NAMES, ids=ascii)
def test_file_names_that_lead_elsewhere_are_refused(model, name):
    shutil.copy(model / SHARD, model / "x.bin")
    edit_json(model / INDEX, lambda index: index["weight_map"].update({f"{UP}.weight": name}))
    refusal(model)


@pytest.mark.parametrize("names", [("a/x.safetensors", "b/x.safetensors"), ("x.safetensors", "b/X.safetensors")])
def test_files_that_would_be_written_to_one_are_refused(model, names):
    for old, new in zip(sorted(model.glob("*.safetensors")), names, strict=True):
        (model / new).parent.mkdir(exist_ok=True)
        edit_json(model / INDEX, lambda index, old=old, new=new: rename(index["weight_map"], old.name, new))
        old.rename(model / new)
    refusal(model, "would be written to one file")


def rename(weight_map, old, new):
    weight_map.update({name: new for name, file in weight_map.items() if file == old})


def test_files_in_subfolders_are_written_side_by_side(model, tmp_path):
    expected = {name for path in model.glob("*.safetensors") for name in load_file(path)}
    for number, path in enumerate(sorted(model.glob("*.safetensors"))):
        (model / f"part{number}").mkdir()
        path.rename(model / f"part{number}" / path.name)
        edit_json(
            model / INDEX,
            lambda index, path=path, n=number: rename(index["weight_map"], path.name, f"part{n}/{path.name}"),
        )
    write(model, tmp_path / "out")
    assert {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)} >= expected


TENSORS = {
    "a norm is missing": ("model.norm.weight", lambda t: t.pop("model.norm.weight")),
    "an embedding is missing": ("model.embed_tokens.weight", lambda t: t.pop("model.embed_tokens.weight")),
    "a layer is missing": (f"{UP}.weight", lambda t: t.pop(f"{UP}.weight")),
    "another shape": (f"{UP}.weight", lambda t: t.update({f"{UP}.weight": torch.ones(3, 64)})),
    "more dimensions": (f"{UP}.weight", lambda t: t.update({f"{UP}.weight": torch.ones(96, 64, 1)})),
    "integers": (f"{UP}.weight", lambda t: t.update({f"{UP}.weight": torch.ones(96, 64, dtype=torch.int8)})),
    "fp8": (f"{UP}.weight", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.float8_e4m3fn)})),
    "a norm of integers": (
        "model.norm.weight",
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
    ),
    "a scale is there": (f"{UP}.weight", lambda t: t.update({f"{UP}.weight_scale": torch.ones(96)})),
    "a packed weight is there": (f"{UP}.weight", lambda t: t.update({f"{UP}.weight_packed": torch.ones(96)})),
    "NaN": (f"{UP}.weight", lambda t: t[f"{UP}.weight"].fill_(float("nan"))),
    "a name of two lines": (f"{UP}.weight", lambda t: t.update({"a\nb": torch.ones(1)})),
    "experts": (f"{UP}.weight", lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 4)})),
    "a router": (
        f"{UP}.weight",
        lambda t: t.update({"model.layers.0.block_sparse_moe.router.weight": torch.ones(4, 64)}),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_would_not_load_are_refused(model, case):
    name, change = TENSORS[case]
    edit_tensors(places(model)[name], change)
    refusal(model)


def test_a_tensor_in_two_files_counts_where_the_index_names_it(model, tmp_path):
    right = places(model)[f"{UP}.weight"]
    (wrong,) = set(model.glob("*.safetensors")) - {right}
    edit_tensors(wrong, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(96, 64)}))
    write(model, tmp_path / "out")
    assert f"{UP}.weight" not in load_file(tmp_path / "out" / wrong.name)
    assert_holds(tmp_path / "out", model)
    edit_json(model / INDEX, lambda index: index["weight_map"].pop(f"{UP}.weight"))
    refusal(model, f"{UP}.weight is in .* and in ")


def test_a_checkpoint_without_an_index(tmp_path):
    folder = write_tiny(tmp_path / "model", num_hidden_layers=1, max_shard_size="1GB")
    write(folder, tmp_path / "out")
    assert_holds(tmp_path / "out", folder)


FILES = ["config.json", INDEX, SHARD, "tokenizer.json", "chat_template.jinja", "LICENSE.txt", "generation_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_pipes_in_a_source_do_not_hang(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert name in refusal(model)


@pytest.mark.parametrize("how", ["absolute", "relative", "through a folder", "broken"])
@pytest.mark.parametrize("name", FILES)
def test_what_links_outside_a_source_is_refused(model, tmp_path, name, how):
    secret = tmp_path / "private" / "secret"
    secret.parent.mkdir()
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"secret")
    (model / name).unlink(missing_ok=True)
    if how == "through a folder":
        (model / "sub").symlink_to(secret.parent)
        (model / name).symlink_to("sub/secret")
    elif how == "broken":
        secret.unlink()
        (model / name).symlink_to(secret)
    else:
        (model / name).symlink_to(secret if how == "absolute" else "../private/secret")
    assert name in refusal(model, "is a link to|is missing|names|no regular file")


def test_the_layout_of_the_hubs_cache_is_read(model, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    write(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path("{marker}").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(model, tmp_path, monkeypatch):
    """A model of a kind that only its own Python file knows, which leaves a mark when it runs."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    (model / "own.py").write_text(CODE.format(marker=tmp_path / "ran"))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(model / "config.json", lambda config: config.update(model_type="own", auto_map=auto_map))
    return model


def test_code_of_a_checkpoint_is_not_run(with_code, tmp_path):
    assert "give --trust-remote-code to run it" in refusal(with_code)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(EvalError, match="no tokenizer that loads"):
        token_windows(with_code, "text", 8, 8)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_checkpoint_is_run_and_copied_where_it_is_trusted(with_code, tmp_path):
    source = open_source(with_code, trust_remote_code=True)
    write_checkpoint(source, tmp_path / "out", "rowint8", (), round_to_nearest(source.layers))
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "own.py").read_text() == (with_code / "own.py").read_text()
    assert_holds(tmp_path / "out", with_code)


def test_a_known_model_with_code_is_read_without_it(model, tmp_path):
    (model / "own.py").write_text(CODE.format(marker=tmp_path / "ran"))
    edit_json(model / "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "own.OwnModel"}))
    write(model, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out" / "own.py").exists()


def test_a_full_disk_while_tensors_are_written_is_one_line(model):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert "cannot write" in refusal(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_file_is_as_readable_as_the_umask_lets(model, tmp_path):
    before = os.umask(0o022)
    try:
        write(model, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
