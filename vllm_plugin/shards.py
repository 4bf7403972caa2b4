"""Which file a tensor of a checkpoint is read from, where it stands in more than one.

vLLM reads every file and lets the last one win. INT8 layers are quantized when their last tensor has been read, so a
second one would come too late. Here the file counts that the index names; without an index the checkpoint is refused.
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

logger = init_logger(f"vllm.{__name__}")

INDEX = "model.safetensors.index.json"
_ADVICE = f"remove the files that do not belong to the model, or name the right one in {INDEX}"


def one_of_each(
    weights: Iterable[tuple[str, Tensor]], model_config: Any, load_config: Any
) -> Iterator[tuple[str, Tensor]]:
    """vLLM's stream of (name, tensor), every name once, and from the file that the index names.

    Raises:
        ValueError: a tensor stands in more than one file, and no index says in which.
    """
    stream = iter(weights)
    first = next(stream, None)  # vLLM fetches the files when the first tensor is asked for
    if first is None:
        return
    chosen = files_of_repeated(_folder(model_config, load_config))
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
    index = folder / INDEX
    weight_map = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    chosen = {}
    for name, files in _files_by_tensor(folder, set(weight_map.values())).items():
        if len(files) > 1:
            if name not in weight_map:
                raise ValueError(f"{name} stands in {' and in '.join(files)}; {_ADVICE}")
            chosen[name] = folder / weight_map[name]
            logger.warning(
                "rowint8: %s stands in %s; the index says %s", name, " and in ".join(files), weight_map[name]
            )
    return chosen


def _files_by_tensor(folder: Path, indexed: set[str]) -> dict[str, list[str]]:
    """Names of the files that hold each tensor, of those that vLLM reads: all, or those of an index."""
    files = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in indexed or not indexed:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    files[name].append(path.name)
    return files


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
