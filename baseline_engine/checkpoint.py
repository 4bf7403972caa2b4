"""Safetensors into a model, one tensor at a time, quantized on the way or already INT8. Nothing is ever unpickled.

Headers are compared with config.json before memory is taken. The weights are allocated once, in their final format.
Each checkpoint tensor is mapped from its file, copied or quantized into its place, and unmapped: beyond the final
weights, loading holds one tensor.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rowint8.baseline_engine.errors import EngineError, one_line, shown
from rowint8.baseline_engine.files import read_json, require_file
from rowint8.baseline_engine.layers import Int8Linear, Place, WeightFormat
from rowint8.baseline_engine.model import Decoder
from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.baseline_engine.progress import progress_bar
from rowint8.kernels.activations import check_rotation
from rowint8.kernels.quantize import Int8Weight, check_stored

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
"""What is fetched of a hub repository: configuration, weights, tokenizer; no code and no pickles."""

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOAT_DTYPES = ("F32", "BF16", "F16")
_INT8_DTYPES, _SCALE_DTYPES = ("I8",), ("F16",)


class StoredInt8Linear(Int8Linear):
    """INT8 rows that the checkpoint already holds: `<name>.weight` int8 [N, K] and `<name>.weight_scale` fp16 [N]."""

    def _weight_places(self, name: str, rows: slice) -> dict[str, Place]:
        stored, missing = Int8Weight(self.values[rows], self.scale[rows]), {"values", "scale"}

        def place(field: str) -> Place:
            target = getattr(stored, field)

            def load(tensor: Tensor) -> None:
                target.copy_(tensor)
                missing.discard(field)
                if not missing:
                    check_stored(stored, f"{name}.weight")

            return Place(tuple(target.shape), load)

        return {f"{name}.weight": place("values"), f"{name}.weight_scale": place("scale")}


class StoredInt8Format(WeightFormat):
    """The format of a rowint8 checkpoint, whose linear layers are all INT8."""

    def linear(self, in_features: int, out_features: int, bias: bool) -> StoredInt8Linear:
        return StoredInt8Linear(in_features, out_features, bias, self.dtype, self.device, self.rotation)


def resolve_folder(model: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of `model`: a local one as it is, or a hub repository's snapshot ("owner/name"), fetched if need be.

    Args:
        files: names or patterns of what is fetched.

    Raises:
        EngineError: it is neither, or the hub cannot be reached.
    """
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError) as error:  # a name too long, or ~ of nobody
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise EngineError(f"model {shown(model)} is no folder here: {reason}") from error
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise EngineError(f"model {shown(model)} is no folder here; give a folder or a hub name such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:  # network, hub and cache errors have no common base class
        reason = str(error).split("\n")[0] or type(error).__name__
        raise EngineError(
            f"model {shown(model)} is no folder here and cannot be fetched from the hub: {reason}"
        ) from error


def load_model(folder: Path, config: ModelConfig, weight_format: WeightFormat, *, progress: bool = False) -> Decoder:
    """Builds the model and fills it from the folder's safetensors; `progress` shows a bar on a terminal's stderr.

    Raises:
        EngineError: a shard or tensor is missing, unknown, truncated, of the wrong shape or dtype, or holds NaN, Inf or
            a scale that no row has; INT8 rows are rotated otherwise than config.json says; or memory does not suffice.
            Names, shapes and dtypes are checked before memory is taken.
    """
    if config.stored_int8:
        weight_format = StoredInt8Format(**vars(weight_format))
    shards = {path: read_header(path) for path in shard_paths(folder)}
    _check_depth(shards, config)
    sketch = Decoder(config, replace(weight_format, device=torch.device("meta")))
    _check_tensors(shards, sketch.places(), tied=config.tie_word_embeddings)
    _check_tied_head(shards, config.tie_word_embeddings)
    if config.stored_int8:
        check_rows(shards, config.stored_int8.rotation)
    _check_memory(sketch.weight_bytes, weight_format)
    model = Decoder(config, weight_format)
    places = model.places()
    total = sum(len(header) for header in shards.values())
    with progress_bar("loading weights", total, progress) as advance:
        for path, header in shards.items():
            for name in header:
                if name in places:
                    _load_tensor(path, name, places[name], weight_format.device)
                advance()
    return model


def _load_tensor(path: Path, name: str, place: Place, device: torch.device) -> None:
    try:
        place.load(read_tensor(path, name, device))
    except (ValueError, SafetensorError, OSError) as error:
        raise EngineError(f"{path}: {error}") from error


def read_tensor(path: Path, name: str, device: torch.device) -> Tensor:
    """Opens the file anew for each tensor: a file kept open keeps every page read so far in this process's memory."""
    with safe_open(path, framework="pt", device=str(device)) as shard:
        return shard.get_tensor(name)


def shard_paths(folder: Path) -> list[Path]:
    """The folder's safetensors, by its index where it has one; EngineError where one is missing."""
    index = folder / _INDEX
    if not index.exists():
        if (folder / _SINGLE).exists():
            return [require_file(folder / _SINGLE)]
        if parts := sorted(path.name for path in folder.glob("*.safetensors")):
            raise EngineError(f"{folder} has {', '.join(parts)}, but no {_INDEX}, which says what each file holds")
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise EngineError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, but {', '.join(others)}; only safetensors load"
        )
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise EngineError(f"{index} is no safetensors index (an object whose weight_map gives each tensor a file)")
    names = sorted(set(names))
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise EngineError(f"{index} names {shown(outside[0])}, which is outside of the folder; only files in it load")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise EngineError(f"{folder}: {index.name} names {', '.join(missing)}, which is missing; fetch the model again")
    return [require_file(folder / name) for name in names]


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of every tensor in the file; no weight is read."""
    try:
        with safe_open(path, framework="pt") as shard:
            slices: dict[str, Any] = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error


def check_rows(shards: Mapping[Path, Collection[str]], rotation: int | None) -> None:
    """EngineError unless the files' INT8 rows are rotated by `rotation`, the largest block, or not at all for None."""
    for path in (path for path, names in shards.items() if any(name.endswith(".weight_scale") for name in names)):
        with safe_open(path, framework="pt") as shard:
            metadata = shard.metadata()
        try:
            check_rotation(path, metadata, rotation)
        except ValueError as error:
            raise EngineError(str(error)) from None


def _check_depth(shards: dict[Path, dict], config: ModelConfig) -> None:
    """The names decide how many layers are built: config.json may ask for any number."""
    names = (name for header in shards.values() for name in header)
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    if len(layers) != config.num_layers:
        folder = next(iter(shards)).parent
        raise EngineError(f"{folder}: the weights have {len(layers)} layers; config.json asks for {config.num_layers}")


def _check_tensors(shards: dict[Path, dict], places: dict[str, Place], *, tied: bool) -> None:
    """Every place has one tensor of its shape and dtype, and every tensor a place."""
    file_of: dict[str, Path] = {}
    for path, header in shards.items():
        for name, (shape, dtype) in header.items():
            if name in file_of:
                raise EngineError(f"{name} is in {file_of[name]} and in {path.name}; fetch the model again")
            file_of[name] = path
            if name not in places:
                _check_ignorable(path, name, tied)
            elif shape != places[name].shape:
                expected = list(places[name].shape)
                raise EngineError(f"{path}: {name} has shape {list(shape)}; config.json asks for {expected}")
            elif dtype not in (accepted := _accepted_dtypes(name, places)):
                raise EngineError(f"{path}: {name} is {dtype}; accepted are {', '.join(accepted)}")
    missing = sorted(places.keys() - file_of.keys())
    if missing:
        folder = next(iter(shards)).parent
        raise EngineError(f"{folder}: {missing[0]} is missing ({len(missing)} tensors in all); fetch the model again")


def _accepted_dtypes(name: str, places: dict[str, Place]) -> tuple[str, ...]:
    """A weight that has a scale beside it is INT8."""
    if f"{name}_scale" in places:
        return _INT8_DTYPES
    return _SCALE_DTYPES if name.endswith(".weight_scale") else _FLOAT_DTYPES


def _check_memory(needed: int, weight_format: WeightFormat) -> None:
    """A GPU says so itself; the CPU's memory is promised without end, and who uses it is killed."""
    free = psutil.virtual_memory().available
    if weight_format.device.type == "cpu" and needed > free:
        gib = 2**30
        raise EngineError(f"the weights take {needed / gib:.1f} GiB of memory, of which {free / gib:.1f} are free")


def _check_tied_head(shards: dict[Path, Any], tied: bool) -> None:
    """Refuses an output layer of its own where config.json says that the embedding is the output layer."""
    paths = {name: path for path, header in shards.items() for name in header}
    if not tied or _HEAD not in paths or _EMBEDDING not in paths:
        return
    _, dtype = shards[paths[_HEAD]][_HEAD]
    head, embedding = (read_tensor(paths[name], name, torch.device("cpu")) for name in (_HEAD, _EMBEDDING))
    if dtype not in _FLOAT_DTYPES or not torch.equal(head, embedding):  # some dtypes cannot be compared
        raise EngineError(
            f"{paths[_HEAD]}: {_HEAD} differs from {_EMBEDDING}, though tie_word_embeddings is true; set it to false, "
            "or leave the tensor out"
        )


def _check_ignorable(path: Path, name: str, tied: bool) -> None:
    """A tied checkpoint may repeat its embedding as lm_head; old ones hold rotary frequencies, which are computed."""
    if not (tied and name == _HEAD) and not name.endswith("rotary_emb.inv_freq"):
        raise EngineError(f"{path}: unexpected tensor {shown(name)}; config.json describes a model without it")
