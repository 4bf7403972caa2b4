"""Checkpoints to spoil, and what must be true of what is written from them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.checkpoint import round_to_nearest, write_checkpoint
from rowint8.eval.quantize.source import INDEX, open_source
from rowint8.kernels.quantize import quantize_rowwise
from tests.tiny_models import write_tiny

UP = "model.layers.1.mlp.up_proj"


def write_original(folder: Path) -> Path:
    """A checkpoint in two files with an index, and files that are copied."""
    write_tiny(folder, max_shard_size="200KB", num_hidden_layers=2)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def places(folder: Path) -> dict[str, Path]:
    """Each tensor's file, as the index says where there is one."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            found |= dict.fromkeys(shard.keys(), path)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        found |= {name: folder / file for name, file in index.items()}
    return found


def write(folder: Path, out: Path, form: str = "rowint8") -> None:
    source = open_source(folder)
    write_checkpoint(source, out, form, (), round_to_nearest(source.layers))


def refusal(folder: Path, message: str = ".") -> str:
    """The one line that refuses to quantize a folder; nothing is left beside it."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(EvalError, match=message) as caught:
        write(folder, folder.parent / "out")
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.iterdir()) == before
    return str(caught.value)


def assert_holds(out: Path, source: Path) -> None:
    """Every tensor of the source is in `out`, as it was or rounded, and some are rounded."""
    wanted, found, rounded = places(source), places(out), 0
    tensors = {path: load_file(path) for path in {*wanted.values(), *found.values()}}
    for name, path in wanted.items():
        before, after = tensors[path][name], tensors[found[name]][name]
        if after.dtype == torch.int8:
            rounded += 1
            before, scale = quantize_rowwise(before)
            assert torch.equal(tensors[found[f"{name}_scale"]][f"{name}_scale"], scale)
        assert before.dtype == after.dtype
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert rounded
    assert len(found) == len(wanted) + rounded
