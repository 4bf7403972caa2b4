"""Writes a checkpoint with INT8 weights from one in fp32, bf16 or fp16: what `rowint8 quantize` does.

Each safetensors file of the source becomes one of the same name, written before the next is read: memory holds the
converted tensors of one file and one tensor of the source.
"""

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rowint8.baseline_engine.checkpoint import read_tensor
from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.experts import apart, layer_of
from rowint8.eval.quantize.folder import whole_folder
from rowint8.eval.quantize.formats import FORMATS, CheckpointFormat
from rowint8.eval.quantize.source import INDEX, Source, copied_files
from rowint8.kernels.activations import ROTATED_BY, rotation_block
from rowint8.kernels.quantize import Int8Weight, quantize_rowwise

Convert = Callable[[str, Tensor], Tensor | Int8Weight]
"""(name in the source, tensor) -> what is stored in its place; ValueError names a tensor that cannot be quantized."""


@dataclass(frozen=True)
class Written:
    """What `write_checkpoint` wrote."""

    int8_layers: int
    source_bytes: int
    """Bytes of the weight files."""
    written_bytes: int


def round_to_nearest(layers: Collection[str], rotation: int | None = None) -> Convert:
    """Rounds the weights of `layers`; other tensors stay as they are.

    Args:
        rotation: for INT8 activations, the largest block of columns that are rotated together before.
    """

    def convert(name: str, tensor: Tensor) -> Tensor | Int8Weight:
        if layer_of(name) not in layers:
            return tensor
        return quantize_rowwise(tensor, name=name, block=block_of(tensor, rotation))

    return convert


def block_of(weight: Tensor, rotation: int | None) -> int:
    """Columns of a weight [N, K] that are rotated together; 1 is no rotation."""
    return 1 if rotation is None else rotation_block(weight.shape[1], rotation)


def write_checkpoint(
    source: Source,
    out: Path,
    form: str,
    ignored: Collection[str],
    convert: Convert,
    advance: Callable[[], None] = lambda: None,
    rotation: int | None = None,
) -> Written:
    """Writes the folder `out`, which appears whole or not at all.

    Args:
        form: one of `FORMATS`.
        ignored: layers that `convert` leaves alone, for config.json.
        advance: called after each tensor.
        rotation: by which `convert` rotates, for config.json and the files' metadata; only the format rowint8 says it.

    Raises:
        EvalError: `out` exists or cannot be written, or a weight cannot be quantized.
    """
    if form == "compressed-tensors" and any(layer.endswith(".experts") for layer in source.layers):
        raise EvalError(f"{source.folder} has experts, which are written in the format rowint8 alone")
    quantization = FORMATS[form].config(sorted({*ignored, *source.other_layers}))
    if rotation is not None:
        quantization |= {"activations": "int8", "rotation_block": rotation}
    with whole_folder(out) as folder:
        _write_json(folder / "config.json", source.config | {"quantization_config": quantization})
        sizes = _write_weights(source, folder, FORMATS[form], convert, advance, rotation)
        for name in copied_files(source.folder, code=source.trust_remote_code):
            (folder / name).write_bytes(_read(source.folder / name))
    return sizes


def _write_weights(
    source: Source,
    folder: Path,
    form: CheckpointFormat,
    convert: Convert,
    advance: Callable[[], None],
    rotation: int | None,
) -> Written:
    metadata = {"format": "pt"} | ({} if rotation is None else {ROTATED_BY: str(rotation)})
    weight_map: dict[str, str] = {}
    total_size = int8_layers = 0
    for path, names in source.shards.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            for part, converted in _converted(path, name, convert):
                if isinstance(converted, Int8Weight):
                    shard |= form.tensors(part.removesuffix(".weight"), converted)
                    int8_layers += 1
                else:
                    shard[part] = converted.contiguous()
            advance()
        save_file(shard, folder / path.name, metadata=metadata)
        weight_map |= dict.fromkeys(shard, path.name)
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if (source.folder / INDEX).exists():
        places = dict(sorted(weight_map.items()))
        _write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": places})
    written_bytes = sum((folder / path.name).stat().st_size for path in source.shards)
    return Written(int8_layers, sum(path.stat().st_size for path in source.shards), written_bytes)


def _converted(path: Path, name: str, convert: Convert) -> Iterator[tuple[str, Tensor | Int8Weight]]:
    """What is written for a tensor: itself, or each expert's part of it."""
    try:
        for part, tensor in apart(name, read_tensor(path, name, torch.device("cpu"))):
            converted = convert(part, tensor)
            if isinstance(converted, Tensor) and not _is_finite(converted):
                raise ValueError(f"{name} holds NaN or Inf, with which no model answers; fetch the model again")
            yield part, converted
    except (ValueError, TypeError, SafetensorError, OSError) as error:
        raise EvalError(f"{path}: {error}") from None


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf, told without a copy. Tensors of 8 bits are none of a plain model's weights."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.numel() == 0:
        return True
    return bool(torch.linalg.vector_norm(tensor, float("inf")).isfinite())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from None
