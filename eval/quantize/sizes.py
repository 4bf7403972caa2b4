"""What a model weighs, and what a token makes a card read, in bf16 and in INT8: from its config.json alone."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rowint8.baseline_engine.errors import EngineError, one_line, shown
from rowint8.baseline_engine.files import read_json
from rowint8.eval.errors import EvalError
from rowint8.eval.models import FORMATS, MODELS
from rowint8.eval.quantize.source import described, source_folder

FORMS = {"bf16": (), "rowint8": ("linear",), "rowint8 + lm_head": ("linear", "head")}
"""Form to the kinds of weights that are INT8 in it."""
_MOST_LAYERS = 1000
"""transformers builds a model of more layers for minutes before it says anything."""


@dataclass(frozen=True)
class ModelSizes:
    """A model, as far as its config.json tells."""

    model: str
    hidden_size: int
    quantized_by: str | None
    """The method of a checkpoint that is quantized already; sizes are those of its bf16 original."""
    decoder_layers: int
    linear_layers: int
    """Linear layers that become INT8, experts not counted."""
    has_experts: bool
    weights: dict[str, int]
    """Form to the bytes of all weights."""
    read: dict[str, int]
    """Form to the bytes that a token of one request reads: the decoder's and the head's. Of experts the chosen ones
    count, of an embedding that is not the head nothing."""


class _Part(NamedTuple):
    """A weight of the model as a matrix [rows, columns]."""

    kind: str
    """"linear" and "head" can be INT8, "other" stays as it is."""
    rows: int
    columns: int
    read: float
    """The share of it that a token reads."""

    def nbytes(self, form: str) -> int:
        return FORMATS["rowint8" if self.kind in FORMS[form] else "bf16"](self.rows, self.columns)


def read_sizes(model: str, trust_remote_code: bool = False) -> ModelSizes:
    """The sizes of a model, given as a folder, a hub name or one of MODELS.

    Raises:
        EvalError: there is no such model, or transformers knows no causal language model of its config.
    """
    if model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "config.json").write_text(json.dumps(MODELS[model]))
            return _sizes(model, Path(scratch), False)
    return _sizes(model, source_folder(model, ["config.json"]), trust_remote_code)


def _sizes(name: str, folder: Path, trust_remote_code: bool) -> ModelSizes:
    try:
        config = read_json(folder / "config.json")
    except EngineError as error:
        raise EvalError(one_line(error)) from None
    layers = config.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or layers > _MOST_LAYERS:
        raise EvalError(f"{name}: num_hidden_layers is {shown(layers)}; accepted are whole numbers to {_MOST_LAYERS}")
    model, linear, _ = described(folder, trust_remote_code)
    parts = list(_parts(model, {f"{layer}.weight" for layer in linear}))
    quantization, text = config.get("quantization_config"), model.config.get_text_config()
    return ModelSizes(
        model=name,
        hidden_size=text.hidden_size,
        decoder_layers=text.num_hidden_layers,
        quantized_by=one_line(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
        linear_layers=len(linear),
        has_experts=any(0 < part.read < 1 for part in parts),
        weights={form: sum(part.nbytes(form) for part in parts) for form in FORMS},
        read={form: round(sum(part.nbytes(form) * part.read for part in parts)) for form in FORMS},
    )


def _parts(model: Any, linear: set[str]) -> Iterator[_Part]:
    """Each weight once, a tied one as the head."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    read = {id(parameter) for parameter in model.get_decoder().parameters()} - {id(embedding)}
    for name, parameter in model.named_parameters():
        columns = parameter.shape[-1] if parameter.dim() else 1
        matrix = parameter.numel() // max(columns, 1), columns
        if head is not None and parameter is head.weight:
            yield _Part("head", *matrix, 1.0)
        elif parameter.dim() == 3 and ".experts." in name:
            biased = hasattr(model.get_submodule(name.rpartition(".")[0]), f"{name.rpartition('.')[2]}_bias")
            yield _Part("other" if biased else "linear", *matrix, _chosen(model.config) / parameter.shape[0])
        else:
            yield _Part("linear" if name in linear else "other", *matrix, float(id(parameter) in read))


def _chosen(config: Any) -> int:
    """How many experts a token takes, of those that are not shared."""
    return getattr(config.get_text_config(), "num_experts_per_tok", 1)
