"""Safetensors into a model, one tensor at a time, quantized on the way or already INT8. Nothing is ever unpickled.

The model's weights are allocated once, in their final format. Each checkpoint tensor is mapped from its file, copied or
quantized into its place, and unmapped: beyond the final weights, loading holds one tensor.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.layers import Int8Linear, Slot, WeightFormat, copy_slot
from rowint8.baseline_engine.model import Decoder
from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.baseline_engine.progress import progress_bar

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
"""What is fetched of a hub repository: configuration, weights, tokenizer; no code and no pickles."""

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_FLOAT_DTYPES = ("F32", "BF16", "F16")
_INT8_DTYPES, _SCALE_DTYPES = ("I8",), ("F16",)


class StoredInt8Linear(Int8Linear):
    """INT8 rows that the checkpoint already holds: `<name>.weight` int8 [N, K] and `<name>.weight_scale` fp16 [N]."""

    def _weight_slots(self, name: str, rows: slice) -> dict[str, Slot]:
        values, scale = f"{name}.weight", f"{name}.weight_scale"
        return {values: copy_slot(self.values[rows], values), scale: copy_slot(self.scale[rows], scale)}


class StoredInt8Format(WeightFormat):
    """The format of a rowint8 checkpoint, whose linear layers are all INT8."""

    def linear(self, in_features: int, out_features: int, bias: bool) -> StoredInt8Linear:
        return StoredInt8Linear(in_features, out_features, bias, self.dtype, self.device)


def resolve_folder(model: str) -> Path:
    """The folder of `model`: a local one as it is, or a hub repository's snapshot ("owner/name"), fetched if need be.

    Raises:
        EngineError: it is neither, or the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise EngineError(f"model {model!r} is no folder here; give a folder or a hub name such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # network, hub and cache errors have no common base class
        reason = str(error).split("\n")[0] or type(error).__name__
        raise EngineError(f"model {model!r} is no folder here and cannot be fetched from the hub: {reason}") from error


def load_model(folder: Path, config: ModelConfig, form: WeightFormat, *, progress: bool = False) -> Decoder:
    """Builds the model and fills it from the folder's safetensors; `progress` shows a bar on a terminal's stderr.

    Raises:
        EngineError: a shard or tensor is missing, unknown, truncated, of the wrong shape or dtype, or holds NaN or Inf.
            Names, shapes and dtypes are checked before the first weight is read.
    """
    if config.int8_checkpoint:
        form = StoredInt8Format(**vars(form))
    shards = {path: read_header(path) for path in shard_paths(folder)}
    model = Decoder(config, form)
    slots = model.slots()
    _check_headers(shards, slots, tied=config.tie_word_embeddings)
    total = sum(len(header) for header in shards.values())
    with progress_bar("loading weights", total, progress) as advance:
        for path, header in shards.items():
            for name in header:
                if name in slots:
                    _load_tensor(path, name, slots[name], form.device)
                advance()
    return model


def _load_tensor(path: Path, name: str, slot: Slot, device: torch.device) -> None:
    try:
        slot.load(read_tensor(path, name, device))
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
            return [folder / _SINGLE]
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise EngineError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, but {', '.join(others)}; only safetensors load"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        names = []
    if not names:
        raise EngineError(f"{index} is no safetensors index (a JSON object with a weight_map); fetch it again")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise EngineError(f"{folder}: {index.name} names {', '.join(missing)}, which is missing; fetch the model again")
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of every tensor in the file; no weight is read."""
    try:
        with safe_open(path, framework="pt") as shard:
            slices: dict[str, Any] = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error


def _check_headers(shards: dict[Path, dict], slots: dict[str, Slot], *, tied: bool) -> None:
    """Every slot has a tensor of its shape and dtype, and every tensor a slot."""
    for path, header in shards.items():
        for name, (shape, dtype) in header.items():
            if name not in slots:
                _check_ignorable(path, name, tied)
            elif shape != slots[name].shape:
                expected = list(slots[name].shape)
                raise EngineError(f"{path}: {name} has shape {list(shape)}; config.json asks for {expected}")
            elif dtype not in (accepted := _accepted_dtypes(name, slots)):
                raise EngineError(f"{path}: {name} is {dtype}; accepted are {', '.join(accepted)}")
    missing = sorted(slots.keys() - {name for header in shards.values() for name in header})
    if missing:
        folder = next(iter(shards)).parent
        raise EngineError(f"{folder}: {missing[0]} is missing ({len(missing)} tensors in all); fetch the model again")


def _accepted_dtypes(name: str, slots: dict[str, Slot]) -> tuple[str, ...]:
    """A weight that has a scale beside it is INT8."""
    if f"{name}_scale" in slots:
        return _INT8_DTYPES
    return _SCALE_DTYPES if name.endswith(".weight_scale") else _FLOAT_DTYPES


def _check_ignorable(path: Path, name: str, tied: bool) -> None:
    """A tied checkpoint may repeat its embedding as lm_head; old ones hold rotary frequencies, which are computed."""
    if not (tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq"):
        raise EngineError(f"{path}: unexpected tensor {name}; config.json describes a model without it")


def save_model(model: Decoder, source: Path, out: Path) -> None:
    """Writes the model as it is held (INT8 as INT8), with the configuration and tokenizer of the folder `source`.

    The folder `out` appears whole or not at all. Every tensor is copied to the host first.

    Raises:
        EngineError: `out` exists or cannot be written, or the output layer is INT8, for which there is no stored form.
    """
    from huggingface_hub import save_torch_state_dict

    if model.form.int8_lm_head:
        raise EngineError("a model with an INT8 output layer cannot be saved; load it without int8_lm_head")
    if out.exists():
        raise EngineError(f"{out} exists already; remove it or give another folder")
    tensors = {name: held.cpu().clone() for slot in model.slots().values() for name, held in slot.held.items()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(model.form.dtype).removeprefix("torch.")
    if model.form.int8:
        config["quantization_config"] = {"quant_method": "rowint8"}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / out.name
            folder.mkdir()
            save_torch_state_dict(tensors, folder)
            for path in source.iterdir():
                if path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.startswith(
                    "model.safetensors"
                ):
                    shutil.copyfile(path, folder / path.name)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.rename(folder, out)
    except OSError as error:
        raise EngineError(f"cannot write {out}: {error.strerror or error}") from error
