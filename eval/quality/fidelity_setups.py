"""What `rowint8 fidelity` compares: ways of rounding a model's weights, and checkpoints that hold rounded ones.

Every setup yields all tensors of the model as floats, so that applying one leaves nothing of the one before. Where
activations are rounded too, it says how, as floats: what is rotated to be rounded is rotated back.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowint8.baseline_engine.checkpoint import check_rows, read_header, read_tensor, shard_paths
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.files import read_json
from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.experts import layer_of
from rowint8.eval.quantize.source import Source
from rowint8.kernels import ops
from rowint8.kernels.activations import BLOCKS, LARGEST_BLOCK, rotate, rotation_block
from rowint8.kernels.quantize import Int8Weight, dequantize, quantize_rowwise

GROUP = 32
FP8_MAX = 448.0
"""Largest e4m3 number."""

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Yields (checkpoint name, floating tensor)."""


Round = Callable[[Tensor], Tensor]
"""fp32 [..., K] to few bits and back."""


@dataclass(frozen=True)
class WeightSet:
    """A set of weights with a name for the table."""

    name: str
    weights: Weights
    activations: Round | None = None
    """How inputs of `layers` are rounded; the others stay as they are."""
    layers: Collection[str] = ()


def round_rowint8(weight: Tensor) -> Tensor:
    """[N, K] fp32 to INT8 with one fp16 scale a row, and back."""
    return dequantize(quantize_rowwise(weight))


def round_group32(weight: Tensor) -> Tensor:
    """[N, K] fp32 to INT8 with one fp16 scale for each 32 columns, and back: llama.cpp's Q8_0."""
    groups, rest = weight.split([weight.shape[1] // GROUP * GROUP, weight.shape[1] % GROUP], dim=1)
    rounded = round_rowint8(groups.reshape(-1, GROUP)).view(groups.shape)
    return torch.cat((rounded, round_rowint8(rest.contiguous())), dim=1)


def round_fp8_row(weight: Tensor) -> Tensor:
    """[..., K] fp32 to fp8 e4m3 with one fp32 scale a row (or token), absmax to 448, and back."""
    scale = weight.abs().amax(dim=-1, keepdim=True) / FP8_MAX
    scale = torch.where(scale == 0, 1, scale)
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def round_bf16(weight: Tensor) -> Tensor:
    """[N, K] fp32 to bf16 and back; nothing changes where the checkpoint is bf16."""
    return weight.bfloat16().float()


def round_rotated_rows(weight: Tensor, largest: int) -> Tensor:
    """[N, K] fp32, rotated in blocks of at most `largest` columns, to INT8 with one fp16 scale a row, and back."""
    block = rotation_block(weight.shape[-1], largest)
    return rotate(dequantize(quantize_rowwise(weight, block=block)), block)


def round_rotated_tokens(x: Tensor, largest: int) -> Tensor:
    """[..., K] fp32, rotated likewise, to INT8 with one fp32 scale a token, and back."""
    block = rotation_block(x.shape[-1], largest)
    tokens, scale = ops.quantize_tokens(x, block)
    return rotate(tokens.float() * scale[..., None], block)


def _rotated(largest: int) -> tuple[Round, Round]:
    return partial(round_rotated_rows, largest=largest), partial(round_rotated_tokens, largest=largest)


ROUNDINGS: dict[str, tuple[Round, Round | None]] = {
    "rowint8": (round_rowint8, None),
    "rowint8-a8": _rotated(LARGEST_BLOCK),
    "bf16": (round_bf16, None),
    "int8-group32": (round_group32, None),
    "fp8-row": (round_fp8_row, None),
    "fp8-a8": (round_fp8_row, round_fp8_row),
}
"""How weights are rounded, and activations."""
BY_BLOCK = {f"rowint8-a8-{block}": _rotated(block) for block in (1, *BLOCKS[:-1])}
"""rowint8-a8 with smaller blocks; 1 is no rotation."""
QUANTIZATIONS = (*ROUNDINGS, "rowint8+lm_head", "rowint8-a8+lm_head")
ABLATED = ("rowint8", "rowint8-a8")


def choose(names: Sequence[str] | None) -> Sequence[str]:
    """The names, or all of QUANTIZATIONS without any; EvalError where one is unknown."""
    accepted = (*QUANTIZATIONS, *BY_BLOCK)
    if unknown := [name for name in names or () if name not in accepted]:
        raise EvalError(f"--quantization has {', '.join(unknown)}; accepted are {', '.join(accepted)}")
    return names or QUANTIZATIONS


def rounded_setup(source: Source, quantization: str) -> WeightSet:
    """What `choose` accepts, over all linear layers; "+lm_head" takes the output layer too (and a tied embedding)."""
    rounding, _, head = quantization.partition("+")
    layers = source.layers | ({output_layer(source)} if head else frozenset())
    return _rounded_in(source, rounding, layers, quantization)


def _rounded_in(source: Source, rounding: str, layers: Collection[str], name: str) -> WeightSet:
    rows, tokens = (ROUNDINGS | BY_BLOCK)[rounding]
    return WeightSet(name, _rounded(source, rows, layers), tokens, layers)


def ablation_setups(source: Source, rounding: str = "rowint8") -> list[WeightSet]:
    """One of ABLATED in one kind of layer at a time ("only q_proj", "only q_proj, rowint8-a8"), the output layer
    last."""
    by_kind: dict[str, set[str]] = {}
    for layer in sorted(source.layers):
        by_kind.setdefault(layer.rpartition(".")[2], set()).add(layer)
    by_kind["lm_head"] = {output_layer(source)}
    of = "" if rounding == "rowint8" else f", {rounding}"
    return [_rounded_in(source, rounding, layers, f"only {kind}{of}") for kind, layers in by_kind.items()]


def output_layer(source: Source) -> str:
    """Name of the layer whose weight makes the logits: lm_head, or the embedding where it is tied to it.

    Raises:
        EvalError: the checkpoint has neither under its usual name.
    """
    for name in ("lm_head", "model.embed_tokens"):
        if any(f"{name}.weight" in names for names in source.shards.values()):
            return name
    raise EvalError(f"{source.folder} has neither lm_head.weight nor model.embed_tokens.weight")


def original(source: Source) -> Weights:
    """The weights as they are."""
    return _rounded(source, round_bf16, ())


def _rounded(source: Source, rounding: Round, layers: Collection[str]) -> Weights:
    def weights() -> Iterator[tuple[str, Tensor]]:
        for path, names in source.shards.items():
            for name in names:
                tensor = read_tensor(path, name, torch.device("cpu"))
                yield name, rounding(tensor.float()) if name.removesuffix(".weight") in layers else tensor

    return weights


def stored_setup(folder: Path) -> WeightSet:
    """The weights of a rowint8 checkpoint, and INT8 activations where it is made for them.

    Raises:
        EvalError: the folder holds no safetensors, or none in INT8, or its config.json says of them what it cannot.
    """
    try:
        shards = {path: read_header(path) for path in shard_paths(folder)}
        places = {name: path for path, header in shards.items() for name in header}
        largest = _rotation(folder, read_json(folder / "config.json").get("quantization_config"))
        check_rows(shards, None if largest == 1 else largest)
    except EngineError as error:
        raise EvalError(str(error)) from None
    if not any(name.endswith(".weight_scale") for name in places) or any("weight_packed" in name for name in places):
        raise EvalError(f"{folder} is no rowint8 checkpoint; `rowint8 quantize` writes one")
    stored = [name.removesuffix("_scale") for name in places if name.endswith(".weight_scale")]
    layers = [layer_of(name) for name in stored if layer_of(name) == name.removesuffix(".weight")]  # but experts

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in places:
            if not name.endswith(".weight_scale"):
                yield name, _read_dequantized(places, name, largest if layer_of(name) in layers else 1)

    return WeightSet(folder.name, weights, None if largest == 1 else _rotated(largest)[1], layers)


def _rotation(folder: Path, quantization: Any) -> int:
    """The largest rotated block that a `quantization_config` gives; 1 without INT8 activations."""
    given = quantization if isinstance(quantization, dict) else {}
    activations, block = given.get("activations"), given.get("rotation_block", LARGEST_BLOCK)
    if activations not in (None, "int8") or block not in BLOCKS:
        raise EvalError(f"{folder}: config.json has activations and rotation_block as `rowint8 quantize` has not")
    return block if activations else 1


def _read_dequantized(places: dict[str, Path], name: str, largest: int) -> Tensor:
    tensor = read_tensor(places[name], name, torch.device("cpu"))
    scale = f"{name}_scale"
    if scale not in places:
        return tensor
    scales = read_tensor(places[scale], scale, torch.device("cpu"))
    if tensor.dtype != torch.int8 or scales.shape != tensor.shape[:1]:
        raise EvalError(f"{places[scale]}: {name} and its scales are no rowint8 weight")
    return rotate(dequantize(Int8Weight(tensor, scales)), rotation_block(tensor.shape[1], largest))
