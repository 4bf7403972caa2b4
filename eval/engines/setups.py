"""What `bench vllm` and `bench serve` compare and on which model: setups of vLLM, model shapes with dummy weights."""

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rowint8.eval.errors import EvalError
from rowint8.eval.models import DEFAULT_MODEL, MODELS
from rowint8.eval.quantize.formats import packed_config


@dataclass(frozen=True)
class Setup:
    """One way of running a model in vLLM."""

    llm: Mapping[str, Any]
    """Arguments of `vllm.LLM`."""
    env: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None
    """What must be installed besides vLLM, by its import name."""

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _rowint8(**options: bool) -> Setup:
    config = {"quant_method": "rowint8", "serialized": False, **options}
    return Setup({"hf_overrides": {"quantization_config": config}})


SETUPS = {
    "bf16": Setup({}),
    "rowint8": Setup({"quantization": "rowint8"}),
    "rowint8-no-norm": _rowint8(fuse_norm=False),
    "rowint8-unfused": _rowint8(fuse_swiglu=False, fuse_norm=False),
    "rowint8-lm-head": _rowint8(lm_head=True),
    "fp8": Setup({"quantization": "fp8"}),
    "w8a16": Setup({"load_format": "dummy", "hf_overrides": {"quantization_config": packed_config(())}}),
    "humming": Setup(
        {"quantization": "humming"}, {"VLLM_HUMMING_ONLINE_QUANT_CONFIG": '{"dtype": "int8"}'}, package="humming"
    ),
}
"""All in bf16 arithmetic. w8a16 is a compressed-tensors checkpoint, INT8 with one scale a row: it would have to be made
first, so its weights are dummies whatever the model."""


def choose_setups(names: str | None, known: Mapping[str, Setup] = SETUPS) -> list[str]:
    """The setups of a comma-separated list, or all that are known.

    Raises:
        EvalError: one is unknown or named twice.
    """
    chosen = names.split(",") if names else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise EvalError(f"--setups has {', '.join(unknown)}; accepted are {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise EvalError(f"--setups names one twice: {names}")
    return chosen


@contextmanager
def model_folder(model: Path | None, config: str | None, layers: int | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model to measure: its folder, and the arguments of `vllm.LLM` that load it.

    Args:
        model: a folder with weights; without it, dummy weights of the shape `config` (see `write_shape`).
        layers: depth of the shape instead of its own.

    Raises:
        EvalError: the options contradict, or there is no such model or shape.
    """
    if model is None:
        with tempfile.TemporaryDirectory(prefix="rowint8-") as scratch:
            write_shape(config or DEFAULT_MODEL, Path(scratch), layers)
            yield Path(scratch), {"load_format": "dummy"}
        return
    if config or layers:
        raise EvalError("--config and --layers are of dummy weights; a --model is measured as it is")
    if not (model / "config.json").is_file():
        raise EvalError(f"--model: {model} is not a model folder (no config.json)")
    yield model.resolve(), {}


def write_shape(config: str, folder: Path, layers: int | None = None) -> None:
    """Writes into `folder` the config.json of one of MODELS, or of a path to a config.json or its folder.

    Args:
        layers: depth instead of the model's own.

    Raises:
        EvalError: there is no such shape or file, or the depth cannot be cut.
    """
    shape = dict(MODELS[config]) if config in MODELS else _read_config(Path(config))
    if layers is not None:
        if not isinstance(shape.get("num_hidden_layers"), int):
            raise EvalError(f"--layers: {config} has no num_hidden_layers")
        shape["num_hidden_layers"] = layers
        if "layer_types" in shape:
            shape["layer_types"] = shape["layer_types"][:layers]
    (folder / "config.json").write_text(json.dumps(shape, indent=2))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text())
    except OSError:
        raise EvalError(f"--config is {path}; accepted are {', '.join(MODELS)} and the path of a config.json") from None
    except ValueError as error:
        raise EvalError(f"{file} is not JSON: {error}") from None
