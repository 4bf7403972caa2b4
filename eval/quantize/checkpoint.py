"""Writes a checkpoint with INT8 weights from one in fp32, bf16 or fp16: what `rowint8 quantize` does.

Each safetensors file of the source becomes one of the same name, written before the next is read: memory holds the
converted tensors of one file and one tensor of the source. All is written into a hidden folder beside the target, which
is renamed at the end, so an interrupted run leaves nothing under the final name.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rowint8.baseline_engine.checkpoint import read_header, read_tensor, resolve_folder, shard_paths
from rowint8.baseline_engine.errors import EngineError
from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.formats import FORMATS, CheckpointFormat
from rowint8.kernels.quantize import Int8Weight, quantize_rowwise

INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_WRITTEN = re.compile(r"config\.json|.*\.index\.json")
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines merge into one, and that must therefore be quantized or not together."""

Convert = Callable[[str, Tensor], Tensor | Int8Weight]
"""(name in the source, tensor) -> what is stored in its place; ValueError names a tensor that cannot be quantized."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to quantize: what is in it, with no weight read yet."""

    folder: Path
    config: dict[str, Any]
    shards: dict[Path, tuple[str, ...]]
    """File -> names of its tensors."""
    layers: frozenset[str]
    """Linear layers of the decoder. The output layer (lm_head) is none of them."""

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self.shards.values()))


@dataclass(frozen=True)
class Written:
    """What `write_checkpoint` wrote."""

    int8_layers: int
    source_bytes: int
    """Of the weight files, as are the next."""
    written_bytes: int


def source_folder(model: str) -> Path:
    """The folder of a local or hub checkpoint; EvalError where it is neither."""
    try:
        return resolve_folder(model)
    except EngineError as error:
        raise EvalError(str(error)) from None


def open_source(folder: Path) -> Source:
    """Reads the headers and config of a checkpoint.

    Raises:
        EvalError: a file is missing or broken, the checkpoint is quantized already, or it is of no kind that can be
            quantized.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shards = {path: tuple(read_header(path)) for path in shard_paths(folder)}
    except (EngineError, OSError, ValueError) as error:
        raise EvalError(str(error)) from None
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unnamed method")
        raise EvalError(f"{folder} is already quantized ({method}); give the fp32, bf16 or fp16 original")
    names = {name for header in shards.values() for name in header}
    if any(".experts." in name for name in names):
        raise EvalError(
            f"{folder} is a mixture of experts, which cannot be written in INT8 yet; vLLM quantizes its dense layers "
            "while loading with --quantization rowint8"
        )
    layers = decoder_linears(folder)
    missing = sorted(layer for layer in layers if f"{layer}.weight" not in names)
    if missing or not layers:
        what = f"{missing[0]}.weight is missing" if missing else "the model has no linear layers"
        raise EvalError(f"{folder}: {what}; only whole decoder models with plain linear layers can be quantized")
    return Source(folder, config, shards, layers)


def decoder_linears(folder: Path) -> frozenset[str]:
    """Names of every linear layer but the output layer, found in transformers' model of that config (without memory).

    Raises:
        EvalError: transformers knows no causal language model of that config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EvalError(f"{folder}: transformers has no causal language model for it: {reason}") from None
    head = model.get_output_embeddings()
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    return frozenset(linears)


def ignored_layers(layers: Collection[str], ignore: Sequence[str]) -> frozenset[str]:
    """Those of `layers` that `ignore` names: in full, or by "re:" and a pattern that matches from the start.

    Raises:
        EvalError: an entry is no regular expression or matches nothing, or only a part of a merged layer is ignored.
    """
    found: set[str] = set()
    for entry in ignore:
        try:
            pattern = re.compile(entry[3:] if entry.startswith("re:") else re.escape(entry) + "$")
        except re.error as error:
            raise EvalError(f"--ignore {entry!r} is not a regular expression: {error}") from None
        matches = {layer for layer in layers if pattern.match(layer)}
        if not matches:
            raise EvalError(f"--ignore {entry!r} matches no linear layer; layers are named like {min(layers)!r}")
        found |= matches
    for layer in sorted(found):
        _check_merged(layer, layers, found)
    return frozenset(found)


def _check_merged(layer: str, layers: Collection[str], ignored: Collection[str]) -> None:
    parent, _, kind = layer.rpartition(".")
    for parts in MERGED:
        siblings = [f"{parent}.{part}" for part in parts] if kind in parts else []
        rest = [name for name in siblings if name in layers and name not in ignored]
        if rest:
            raise EvalError(f"--ignore names {layer} but not {', '.join(rest)}; engines merge them: ignore all or none")


def round_to_nearest(layers: Collection[str]) -> Convert:
    """Rounds the weights of `layers`; other tensors stay as they are."""

    def convert(name: str, tensor: Tensor) -> Tensor | Int8Weight:
        return quantize_rowwise(tensor, name=name) if name.removesuffix(".weight") in layers else tensor

    return convert


def write_checkpoint(
    source: Source,
    out: Path,
    form: str,
    ignored: Collection[str],
    convert: Convert,
    advance: Callable[[], None] = lambda: None,
) -> Written:
    """Writes the folder `out`, which appears whole or not at all.

    Args:
        form: one of `FORMATS`.
        ignored: layers that `convert` leaves alone, for config.json.
        advance: called after each tensor.

    Raises:
        EvalError: `out` exists or cannot be written, or a weight cannot be quantized.
    """
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / out.name
            folder.mkdir()
            written = _write_weights(source, folder, FORMATS[form], convert, advance)
            config = source.config | {"quantization_config": FORMATS[form].config(sorted(ignored))}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            _copy_other_files(source.folder, folder)
            os.rename(folder, out)
    except OSError as error:
        raise EvalError(f"cannot write {out}: {error.strerror or error}") from None
    return written


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise EvalError(f"{out} exists already; remove it or give another folder")


def _write_weights(
    source: Source, folder: Path, form: CheckpointFormat, convert: Convert, advance: Callable[[], None]
) -> Written:
    weight_map: dict[str, str] = {}
    total_size = int8_layers = 0
    for path, names in source.shards.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            converted = _converted(path, name, convert)
            if isinstance(converted, Int8Weight):
                shard |= form.tensors(name.removesuffix(".weight"), converted)
                int8_layers += 1
            else:
                shard[name] = converted.contiguous()
            advance()
        save_file(shard, folder / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, path.name)
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if (source.folder / INDEX).exists():
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    written_bytes = sum((folder / path.name).stat().st_size for path in source.shards)
    return Written(int8_layers, sum(path.stat().st_size for path in source.shards), written_bytes)


def _converted(path: Path, name: str, convert: Convert) -> Tensor | Int8Weight:
    try:
        return convert(name, read_tensor(path, name, torch.device("cpu")))
    except (ValueError, TypeError) as error:
        raise EvalError(f"{path}: {error}") from None


def _copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation defaults and licence; no weights and no code."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if not _WRITTEN.fullmatch(path.name):
                shutil.copyfile(path, folder / path.name)
