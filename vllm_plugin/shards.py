"""What is asked of a checkpoint's files: which one a tensor is read from that stands in several, and what rows are.

vLLM reads every file and lets the last one win. INT8 layers are quantized when their last tensor has been read, so a
second one would come too late. Here the file counts that the index names; without an index the checkpoint is refused.

Rotated INT8 rows look like plain ones, so their files say it in their metadata, which is compared with the options.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from vllm.logger import init_logger

from rowint8.kernels.activations import check_rotation

logger = init_logger(f"vllm.{__name__}")

INDEX = "model.safetensors.index.json"
_ADVICE = f"remove the files that do not belong to the model, or name the right one in {INDEX}"


def one_of_each(
    weights: Iterable[tuple[str, Tensor]], model_config: Any, load_config: Any, config: Any
) -> Iterator[tuple[str, Tensor]]:
    """vLLM's stream of (name, tensor), every name once, and from the file that the index names.

    Raises:
        ValueError: a tensor stands in more than one file, and no index says in which; or INT8 rows are rotated
            otherwise than `config`, a `RowInt8Config`, says.
    """
    stream = iter(weights)
    first = next(stream, None)  # vLLM fetches the files when the first tensor is asked for
    if first is None:
        return
    folder = _folder(model_config, load_config)
    chosen = files_of_repeated(folder)
    if folder and config.serialized:
        refuse_other_rows(folder, config.rotation_block if config.activations else None)
    seen = set()
    for name, tensor in chain([first], stream):
        if name not in seen:
            seen.add(name)
            yield name, _read(chosen[name], name) if name in chosen else tensor
        elif name not in chosen:
            raise ValueError(f"{name} stands in more than one file of the checkpoint; {_ADVICE}")


def files_of_repeated(folder: Path | None) -> dict[str, Path]:
    """The right file for each tensor that stands in more than one safetensors file of the folder.

    Raises:
        ValueError: there is no index, or it does not name such a tensor.
    """
    if folder is None:
        return {}
    weight_map = _weight_map(folder)
    chosen = {}
    for name, files in _files_by_tensor(folder).items():
        if len(files) > 1:
            if name not in weight_map:
                raise ValueError(f"{name} stands in {' and in '.join(files)}; {_ADVICE}")
            chosen[name] = folder / weight_map[name]
            logger.warning(
                "rowint8: %s stands in %s; the index says %s", name, " and in ".join(files), weight_map[name]
            )
    return chosen


def refuse_other_rows(folder: Path, rotation: int | None) -> None:
    """ValueError unless the INT8 rows are rotated by `rotation`, the largest block, or not at all where it is None."""
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            if any(name.endswith(".weight_scale") for name in file.keys()):  # noqa: SIM118 (it is no dict)
                check_rotation(path, file.metadata(), rotation)


def _files_by_tensor(folder: Path) -> dict[str, list[str]]:
    """Names of the files that hold each tensor."""
    files = defaultdict(list)
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                files[name].append(path.name)
    return files


def _files(folder: Path) -> list[Path]:
    """The files that vLLM reads: all safetensors, or those of an index."""
    indexed = set(_weight_map(folder).values())
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name in indexed or not indexed]


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    return json.loads(index.read_text())["weight_map"] if index.is_file() else {}


def _folder(model_config: Any, load_config: Any) -> Path | None:
    """Where the checkpoint lies on this machine, if that can be told."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    try:
        return Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=load_config.download_dir,
                local_files_only=True,
            )
        )
    except Exception:  # not from Hugging Face's hub
        return None


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
