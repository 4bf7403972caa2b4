"""What `rowint8 fidelity` compares: ways of rounding a model's weights, and checkpoints that hold rounded ones.

Every setup yields all tensors of the model as floats, so that applying one leaves nothing of the one before.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rowint8.baseline_engine.checkpoint import read_header, read_tensor, shard_paths
from rowint8.baseline_engine.errors import EngineError
from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.source import Source
from rowint8.kernels.quantize import Int8Weight, dequantize, quantize_rowwise

GROUP = 32
FP8_MAX = 448.0
"""Largest e4m3 number."""

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Yields (checkpoint name, floating tensor)."""


@dataclass(frozen=True)
class WeightSet:
    """A set of weights with a name for the table."""

    name: str
    weights: Weights


def round_rowint8(weight: Tensor) -> Tensor:
    """[N, K] fp32 to INT8 with one fp16 scale a row, and back."""
    return dequantize(quantize_rowwise(weight))


def round_group32(weight: Tensor) -> Tensor:
    """[N, K] fp32 to INT8 with one fp16 scale for each 32 columns, and back: llama.cpp's Q8_0."""
    groups, rest = weight.split([weight.shape[1] // GROUP * GROUP, weight.shape[1] % GROUP], dim=1)
    rounded = round_rowint8(groups.reshape(-1, GROUP)).view(groups.shape)
    return torch.cat((rounded, round_rowint8(rest.contiguous())), dim=1)


def round_fp8_row(weight: Tensor) -> Tensor:
    """[N, K] fp32 to fp8 e4m3 with one fp32 scale a row, absmax to 448, and back."""
    scale = weight.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scale = torch.where(scale == 0, 1, scale)
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def round_bf16(weight: Tensor) -> Tensor:
    """[N, K] fp32 to bf16 and back; nothing changes where the checkpoint is bf16."""
    return weight.bfloat16().float()


ROUNDINGS = {"rowint8": round_rowint8, "bf16": round_bf16, "int8-group32": round_group32, "fp8-row": round_fp8_row}
QUANTIZATIONS = (*ROUNDINGS, "rowint8+lm_head")


def choose(names: Sequence[str] | None) -> Sequence[str]:
    """The names, or all of QUANTIZATIONS without any; EvalError where one is unknown."""
    if unknown := [name for name in names or () if name not in QUANTIZATIONS]:
        raise EvalError(f"--quantization has {', '.join(unknown)}; accepted are {', '.join(QUANTIZATIONS)}")
    return names or QUANTIZATIONS


def rounded_setup(source: Source, quantization: str) -> WeightSet:
    """One of QUANTIZATIONS over all linear layers; "+lm_head" takes the output layer too (and a tied embedding)."""
    rounding, _, head = quantization.partition("+")
    layers = source.layers | ({output_layer(source)} if head else frozenset())
    return WeightSet(quantization, _rounded(source, ROUNDINGS[rounding], layers))


def ablation_setups(source: Source) -> list[WeightSet]:
    """rowint8 in one kind of layer at a time ("only q_proj", ...), the output layer last."""
    by_kind: dict[str, set[str]] = {}
    for layer in sorted(source.layers):
        by_kind.setdefault(layer.rpartition(".")[2], set()).add(layer)
    by_kind["lm_head"] = {output_layer(source)}
    return [WeightSet(f"only {kind}", _rounded(source, round_rowint8, layers)) for kind, layers in by_kind.items()]


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


def _rounded(source: Source, rounding: Callable[[Tensor], Tensor], layers: Collection[str]) -> Weights:
    def weights() -> Iterator[tuple[str, Tensor]]:
        for path, names in source.shards.items():
            for name in names:
                tensor = read_tensor(path, name, torch.device("cpu"))
                yield name, rounding(tensor.float()) if name.removesuffix(".weight") in layers else tensor

    return weights


def stored_setup(folder: Path) -> WeightSet:
    """The weights of a rowint8 checkpoint.

    Raises:
        EvalError: the folder holds no safetensors, or none in INT8.
    """
    try:
        paths: Sequence[Path] = shard_paths(folder)
        places = {name: path for path in paths for name in read_header(path)}
    except EngineError as error:
        raise EvalError(str(error)) from None
    if not any(name.endswith(".weight_scale") for name in places) or any("weight_packed" in name for name in places):
        raise EvalError(f"{folder} is no rowint8 checkpoint; `rowint8 quantize` writes one")

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in places:
            if not name.endswith(".weight_scale"):
                yield name, _read_dequantized(places, name)

    return WeightSet(folder.name, weights)


def _read_dequantized(places: dict[str, Path], name: str) -> Tensor:
    tensor = read_tensor(places[name], name, torch.device("cpu"))
    scale = f"{name}_scale"
    if scale not in places:
        return tensor
    scales = read_tensor(places[scale], scale, torch.device("cpu"))
    if tensor.dtype != torch.int8 or scales.shape != tensor.shape[:1]:
        raise EvalError(f"{places[scale]}: {name} and its scales are no rowint8 weight")
    return dequantize(Int8Weight(tensor, scales))
