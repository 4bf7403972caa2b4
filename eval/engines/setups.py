"""The setups that the commands compare, each one way of running a model in an engine, and the model that they run."""

import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rowint8.baseline_engine.files import read_json
from rowint8.eval.errors import EvalError
from rowint8.eval.models import DEFAULT_MODEL, MODELS, refuse_quantized
from rowint8.eval.quantize.formats import packed_config, w8a8_config

if TYPE_CHECKING:
    from rowint8.eval.results.schema import EngineName


@dataclass(frozen=True)
class Setup:
    """One way of running a model in one engine."""

    arguments: Mapping[str, Any]
    """Arguments of `vllm.LLM`, or of the small engine's `EngineConfig`."""
    env: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None
    """What must be installed besides the engine, by its import name."""
    engine: "EngineName" = "vllm"

    def lacks(self) -> str | None:
        """What this machine does not have for it, in a few words; None where it can run."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        method = self.arguments.get("quantization", "rowint8")
        if self.engine != "vllm" or method in ("rowint8", *vllm_methods()):
            return None
        return f"vLLM {version('vllm')} has no --quantization {method}"


def vllm_methods() -> list[str]:
    """The ways of quantizing that the installed vLLM knows by itself."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return list(QUANTIZATION_METHODS)


MOST = 2**24
"""The largest size that a config.json may give."""
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_EXPERTS = ("num_experts", "num_local_experts", "moe_intermediate_size")
_INT8 = {"quantization": "rowint8"}


def _rowint8(**options: Any) -> Setup:
    config = {"quant_method": "rowint8", "serialized": False, **options}
    return Setup({"hf_overrides": {"quantization_config": config}})


def _checkpoint(config: dict[str, Any]) -> Setup:
    """A compressed-tensors checkpoint. Nobody makes it first, so its weights are dummies whatever the model is."""
    return Setup({"load_format": "dummy", "hf_overrides": {"quantization_config": config}})


SETUPS = {
    "bf16": Setup({}),
    "rowint8": Setup(_INT8),
    "rowint8-a8": _rowint8(activations="int8"),
    "rowint8-no-norm": _rowint8(fuse_norm=False),
    "rowint8-unfused": _rowint8(fuse_swiglu=False, fuse_norm=False),
    "rowint8-lm-head": _rowint8(lm_head=True),
    "fp8": Setup({"quantization": "fp8"}),
    "fp8_per_channel": Setup({"quantization": "fp8_per_channel"}),
    "w8a8": _checkpoint(w8a8_config()),
    "w8a16": _checkpoint(packed_config(())),
    "humming": Setup(
        {"quantization": "humming"}, {"VLLM_HUMMING_ONLINE_QUANT_CONFIG": '{"dtype": "int8"}'}, package="humming"
    ),
}
"""vLLM's, all in bf16 arithmetic but for the products of rowint8-a8 (INT8 of both operands), fp8 (a scale a tensor),
fp8_per_channel (a scale a row and a token) and w8a8 (vLLM's own INT8, a scale a row and a token)."""
SERVED = {name: setup for name, setup in SETUPS.items() if not setup.env}
"""Those that need nothing but flags of `vllm serve`."""


def ladder(gpu: bool) -> dict[str, Setup]:
    """The small engine's rungs in order, then another engine: on a GPU each rung keeps what the one before it has.

    On the CPU there are no graphs, and INT8 is not compiled, which gains nothing there. Instead of vLLM stands Hugging
    Face's `generate`, which takes requests of one size only: no throughput workload.
    """
    fused = {**_INT8, "mode": "graph" if gpu else "eager", "fused": True}
    rungs = {
        "bf16-eager": {"mode": "eager"},
        "bf16-compile": {"mode": "compile"},
        "bf16-graph": {"mode": "graph"},
        "int8": {**fused, "fused": False},
        "int8-fused": fused,
        "int8-a8": {**fused, "activations": "int8"},
        "int8-fused-decode-graphs": {**fused, "prompt_graph_tokens": 0},
        "int8-fused-lm-head": {**fused, "int8_lm_head": True},
        "int8-a8-lm-head": {**fused, "activations": "int8", "int8_lm_head": True},
    }
    ours = {name: Setup(given, engine="baseline") for name, given in rungs.items() if gpu or "graph" not in name}
    if gpu:
        return {**ours, **{f"vllm-{name}": SETUPS[name] for name in ("bf16", "rowint8", "rowint8-a8")}}
    return {**ours, "transformers-bf16": Setup({}, engine="transformers")}


def ladder_help() -> str:
    """The names of the setups in `ladder`, with the device of those that need one."""
    on_gpu, on_cpu = ladder(gpu=True), ladder(gpu=False)
    return ", ".join(
        name if name in on_gpu and name in on_cpu else f"{name} ({'GPU' if name in on_gpu else 'CPU'})"
        for name in {**on_gpu, **on_cpu}
    )


def choose_setups(names: str | None, known: Mapping[str, Setup] = SETUPS) -> list[str]:
    """The setups of a comma-separated list, or all that are known.

    Raises:
        EvalError: one is unknown or named twice.
    """
    chosen = list(known) if names is None else names.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise EvalError(f"--setups has {', '.join(unknown)}; accepted are {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise EvalError(f"--setups names one twice: {names}")
    return chosen


@contextmanager
def model_folder(
    model: Path | None, config: str | None, layers: int | None, tokenizer: bool = False
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model to measure: its folder, and the arguments of `vllm.LLM` that load it.

    Args:
        model: a folder with weights; without it, dummy weights of the shape `config` (see `write_shape`).
        layers: depth of the shape instead of its own.
        tokenizer: give dummy weights a tokenizer (see `write_tokenizer`).

    Raises:
        EvalError: the options contradict, there is no such model or shape, or no memory here would hold it.
    """
    if model is None:
        with tempfile.TemporaryDirectory(prefix="rowint8-") as scratch:
            write_shape(config or DEFAULT_MODEL, Path(scratch), layers)
            _refuse_what_no_memory_holds(read_config(Path(scratch)))
            if tokenizer:
                write_tokenizer(Path(scratch))
            yield Path(scratch), {"load_format": "dummy"}
        return
    if config or layers:
        raise EvalError("--config and --layers are of dummy weights; a --model is measured as it is")
    if not (model / "config.json").is_file():
        raise EvalError(f"--model: {model} is not a model folder (no config.json)")
    refuse_quantized(model, read_json(model / "config.json"))
    yield model.resolve(), {}


def write_shape(config: str, folder: Path, layers: int | None = None) -> None:
    """Writes into `folder` the config.json of one of MODELS, or of a path to a config.json or its folder.

    Args:
        layers: depth instead of the model's own.

    Raises:
        EvalError: there is no such model or file, a size in it is none, or the depth cannot be cut.
    """
    shape = dict(MODELS[config]) if config in MODELS else read_config(Path(config))
    if layers is not None:
        if not isinstance(shape.get("num_hidden_layers"), int):
            raise EvalError(f"--layers: {config} has no num_hidden_layers")
        shape["num_hidden_layers"] = layers
        if isinstance(shape.get("layer_types"), list):
            shape["layer_types"] = shape["layer_types"][:layers]
    _check_sizes(shape, config)
    (folder / "config.json").write_text(json.dumps(shape, indent=2))


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds, given by its own path or its folder's.

    Raises:
        EvalError: there is none.
        EngineError: it is no file with a JSON object.
    """
    from rowint8.baseline_engine.files import read_json

    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise EvalError(f"--config is {path}; accepted are {', '.join(MODELS)} and the path of a config.json")
    return read_json(file)


def _check_sizes(config: dict[str, Any], name: str) -> None:
    """Raises EvalError where a size that is given is no whole number from 1 to MOST."""
    for key, size in _sizes(config).items():
        if type(size) is not int or not 1 <= size <= MOST:
            raise EvalError(f"{name}: {key} is {size!r}; accepted are whole numbers from 1 to {MOST:,}")


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Those that are given, of the text model where there are several."""
    text = config.get("text_config")
    given = text if isinstance(text, dict) else config
    return {key: given[key] for key in _SIZES if key in given}


def _refuse_what_no_memory_holds(config: dict[str, Any]) -> None:
    """Raises EvalError where the embedding in bf16 and two INT8 matrices a layer, or an expert, are more than this
    machine holds."""
    import psutil
    import torch

    vocab, hidden, intermediate, layers = ({**dict.fromkeys(_SIZES, 1), **_sizes(config)}).values()
    experts = [config[key] for key in _EXPERTS if type(config.get(key)) is int]
    if len(experts) == 2:  # their number and their own width
        intermediate = math.prod(experts)
    least = 2 * hidden * (vocab + layers * intermediate * (experts[0] if len(experts) == 1 else 1))
    cards = [torch.cuda.get_device_properties(card).total_memory for card in range(torch.cuda.device_count())]
    memory = sum(cards) or psutil.virtual_memory().total
    if least > memory:
        raise EvalError(
            f"the weights take {least / 2**30:,.0f} GiB or more and this machine has {memory / 2**30:,.0f}; "
            "give fewer --layers or a smaller --config"
        )


def vocab_size(folder: Path) -> int:
    """How many token ids a model has, from its config.json.

    Raises:
        EvalError: the file does not say.
    """
    config = read_config(folder)
    _check_sizes(config, str(folder / "config.json"))
    if "vocab_size" not in (sizes := _sizes(config)):
        raise EvalError("the model's config.json has no vocab_size; give one that says it")
    return sizes["vocab_size"]


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer whose words are token ids in six digits, for the vocabulary of the config.json in `folder`.

    Nothing stands between words: vLLM refuses a text longer than its tokens can be at the length of the longest word.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = {f"{token:06}": token for token in range(vocab_size(folder))}
    words = Tokenizer(models.WordLevel(tokens, unk_token="000000"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(".{6}"), "isolated")  # type: ignore[assignment]
    words.decoder = decoders.Fuse()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
