"""A checkpoint before it is quantized: what is in it, checked with no weight read.

What would only show in the written checkpoint is refused here: tensors that the config asks for and the files lack, or
hold in another shape, and files that lie outside the checkpoint's folder.
"""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rowint8.baseline_engine.checkpoint import HUB_FILES, read_header, resolve_folder, shard_paths
from rowint8.baseline_engine.errors import EngineError, one_line, shown
from rowint8.baseline_engine.files import read_json, require_file
from rowint8.eval.errors import EvalError
from rowint8.eval.models import refuse_quantized
from rowint8.eval.quantize.experts import Header, expert_layers, in_model
from rowint8.eval.quantize.layers import linear_layers, time_limit

INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
"""Tokenizer, chat template, generation defaults and licence: files that a quantized checkpoint has as they are."""

_WRITTEN = re.compile(r"config\.json|.*\.index\.json")
_ADDED = (".weight_scale", ".weight_packed", ".weight_shape")
_EXPERTS = re.compile(r"(^|[._])(experts?|router|moe)([._]|$)")
_FLOATS = ("F32", "BF16", "F16")
_LAYERS = re.compile(r"(num|n|encoder|decoder)_(\w+_)?layers?")
_DEEPEST = 50
_BUILD_SECONDS = 60
_MOST_OF_ANYTHING = 1_000_000
"""Larger counts ("num_...") in a config are refused: transformers would fill the memory before it finds an error."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to quantize."""

    folder: Path
    config: dict[str, Any]
    shards: dict[Path, tuple[str, ...]]
    """File -> names of its tensors. No tensor is in two."""
    layers: frozenset[str]
    """Linear layers of the decoder that INT8 is for; all experts of a layer are one, `<block>.experts`."""
    other_layers: frozenset[str]
    """Linear layers that stay as they are, but for the output layer (lm_head), which is in neither."""
    trust_remote_code: bool = False
    """Whether Python files of the checkpoint may run."""

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self.shards.values()))


def source_folder(model: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a local or hub checkpoint, as of `resolve_folder`; EvalError where it is neither."""
    try:
        return resolve_folder(model, files)
    except (EngineError, OSError, RuntimeError) as error:  # RuntimeError: a user's home folder that is not known
        raise EvalError(one_line(error)) from None


def open_source(folder: Path, trust_remote_code: bool = False) -> Source:
    """Reads the headers and config of a checkpoint.

    Raises:
        EvalError: a file is missing, broken or outside the folder, the checkpoint is quantized already, or it is of no
            kind that can be quantized.
    """
    try:
        _check_files(folder, ["config.json", *copied_files(folder, code=trust_remote_code)])
        config = read_json(folder / "config.json")
        weight_map = _weight_map(folder)
        paths = shard_paths(folder)
        _check_files(folder, [str(path.relative_to(folder)) for path in paths])
        headers = {path: read_header(path) for path in paths}
    except (EngineError, OSError, ValueError) as error:
        raise EvalError(one_line(error)) from None
    refuse_quantized(folder, config)
    places = _places(headers, {name: folder / file for name, file in weight_map.items()})
    header = {name: headers[path][name] for name, path in places.items()}
    _check_values(folder / "config.json", config, len(header))
    model, layers, others = described(folder, trust_remote_code)
    experts = expert_layers(header)
    by_model = in_model(model, header) if experts else header
    _check_experts(folder, model, by_model)
    _check_tensors(folder, model, layers, by_model)
    _check_complete(folder, model, by_model)
    shards = {path: tuple(name for name in names if places[name] == path) for path, names in headers.items()}
    return Source(folder, config, shards, layers | experts, others, trust_remote_code)


def copied_files(folder: Path, code: bool = False) -> list[str]:
    """Names of the files that a quantized checkpoint has as they are; with its Python `code` or without."""
    patterns = (*_COPIED, "*.py") if code else _COPIED
    found = [path.name for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()]
    return sorted(name for name in set(found) if not _WRITTEN.fullmatch(name))


def _check_files(folder: Path, names: Iterable[str]) -> None:
    """Each file is a regular one that lies in the folder; in a snapshot of the hub's cache, or among the cache's blobs.

    A link to elsewhere could bring a private file into a checkpoint that is published.
    """
    root = folder.resolve()
    roots = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    for name in names:
        path = require_file(folder / name).resolve()
        if not any(path.is_relative_to(allowed) for allowed in roots):
            raise EvalError(f"{folder / name} is a link to {path}, outside the folder; put a copy of the file there")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file as the index says, empty without an index; EvalError where a file name is no possible one."""
    index = folder / INDEX
    if not os.path.lexists(index):
        return {}
    _check_files(folder, [INDEX])
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise EvalError(f"{index} is no safetensors index (a JSON object with a weight_map of file names)")
    seen: dict[str, str] = {}
    for file in sorted(set(files.values())):
        name = PurePosixPath(file).name
        if not name.endswith(".safetensors") or not file.isprintable():
            raise EvalError(f"{index} names {shown(file)}; accepted are names of .safetensors files in the folder")
        if other := seen.get(name.casefold()):
            raise EvalError(f"{index} names {other} and {file}, which would be written to one file; rename one")
        seen[name.casefold()] = file
    return files


def _check_experts(folder: Path, model: Any, header: Header) -> None:
    """What looks like a part of a mixture of experts is one that the model has."""
    known = model.state_dict().keys()
    if unknown := [name for name in header if _EXPERTS.search(name) and name not in known]:
        raise EvalError(f"{folder} holds {unknown[0]}, a part of experts that config.json does not describe")


def _places(headers: Mapping[Path, Header], index: Mapping[str, Path]) -> dict[str, Path]:
    """The file of each tensor: where two hold it, the one that the index names."""
    places: dict[str, Path] = {}
    for path, header in headers.items():
        for name in header:
            if not name.isprintable():
                raise EvalError(f"{path}: {shown(name)} is no name of a tensor")
            if name in places and index.get(name) not in (path, places[name]):
                raise EvalError(f"{name} is in {places[name]} and in {path}; remove one of the files")
            places[name] = index[name] if name in places else path
    for name, path in index.items():
        if name not in headers[path]:
            raise EvalError(f"{path} lacks {shown(name)}, which the index says it holds; fetch the model again")
    return places


def _check_values(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuses counts that no checkpoint of so many tensors has, before anything is made in such numbers."""
    left: list[tuple[str, Any, int]] = [("", config, 0)]
    while left:
        key, value, depth = left.pop()
        if depth > _DEEPEST:
            raise EvalError(f"{path} is nested more than {_DEEPEST} levels deep, which no config is")
        if isinstance(value, dict):
            left += [(name, part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list):
            left += [(key, part, depth + 1) for part in value]
        elif isinstance(value, (int, float)) and value > _most(key, tensors):
            raise EvalError(f"{path}: {key} is {shown(value)}, but the files hold {tensors} tensors in all")


def _most(key: str, tensors: int) -> float:
    if _LAYERS.fullmatch(key):
        return tensors
    return _MOST_OF_ANYTHING if key.startswith("num_") else math.inf


def described(folder: Path, trust_remote_code: bool) -> tuple[Any, frozenset[str], frozenset[str]]:
    """transformers' model of the config in a folder, without memory, and its `linear_layers`.

    Raises:
        EvalError: transformers knows no causal language model of that config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    try:
        with time_limit(_BUILD_SECONDS), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            return model, *linear_layers(model)
    except Exception as error:  # a config may hold anything, and each model fails at it in its own way
        reason = str(error) or type(error).__name__
    if "trust_remote_code" in reason:
        raise EvalError(f"{folder} needs Python code of its own; read it, then give --trust-remote-code to run it")
    raise EvalError(f"{folder}: transformers has no causal language model for it: {one_line(reason)[:200]}")


def _check_complete(folder: Path, model: Any, header: Header) -> None:
    """Every parameter of the model is in the files; a tied one has several names, and is there under one at least."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    missing = {id_: min(tied) for id_, tied in names.items() if not header.keys() & set(tied)}
    head, unknown = model.get_output_embeddings(), header.keys() - parameters.keys()
    if head is not None and tuple(head.weight.shape) in {header[name][0] for name in unknown}:
        missing.pop(id(head.weight), None)  # the files of some families have another name for it
    if missing:
        first, more = min(missing.values()), f" ({len(missing)} tensors in all)" if len(missing) > 1 else ""
        raise EvalError(f"{folder}: {first} is missing{more}; only whole decoder models can be quantized")


def _check_tensors(folder: Path, model: Any, layers: Collection[str], header: Header) -> None:
    """Tensors have the shapes of the model, and nothing stands where a quantized layer's scales will."""
    if not layers:
        raise EvalError(f"{folder}: the model has no linear layers that vLLM takes as INT8")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape, dtype = header.get(name, (tuple(parameter.shape), _FLOATS[0]))
        if shape != tuple(parameter.shape):
            raise EvalError(f"{folder}: {name} has shape {list(shape)}; config.json asks for {list(parameter.shape)}")
        if dtype not in _FLOATS:
            raise EvalError(f"{folder}: {name} is {dtype}; accepted are {', '.join(_FLOATS)}")
    taken = sorted(f"{layer}{end}" for layer in layers for end in _ADDED if f"{layer}{end}" in header)
    if taken:
        raise EvalError(f"{folder}: {taken[0]} is there already, where the scale of a quantized layer is written")
