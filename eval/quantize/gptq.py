"""Weights rounded for a calibration text, still plain rowint8: what `rowint8 quantize --method gptq` does.

GPTQ (Frantar et al., arXiv:2210.17323) rounds the columns of a weight one after another and makes up for each column's
error in the columns still to come, so that the layer's outputs on the calibration text move least. Columns with the
largest inputs come first ("activation order"). The scales are those of rounding to nearest; only the integers differ.

Inputs are those of the unrounded model: INT8 changes them so little that a second pass through each layer, with its
rounded weights, is better spent on more text. Memory holds the model as it is stored, one decoder layer in fp32, and
the hidden states of the text.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rowint8.baseline_engine.errors import one_line
from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.checkpoint import Convert, block_of, round_to_nearest
from rowint8.eval.quantize.layers import MERGED
from rowint8.eval.quantize.source import Source
from rowint8.kernels.activations import rotate
from rowint8.kernels.quantize import INT8_MAX, Int8Weight, quantize_rowwise, round_to_scale

WINDOW, WINDOWS = 128, 128
"""Tokens of one calibration window, and how many are taken. Short windows show the first token often: its states are
like no other's, and every later token attends to it."""
BATCH = 8
"""Windows that go through a layer at a time."""
DAMPING = 0.1
"""Added to the Hessian's diagonal, in units of its mean. The paper has 0.01, with sixteen times the text; with as
little as here, 0.1 leaves smaller errors on text that the Hessian did not see."""
BLOCK = 128
"""Columns whose errors are made up for in the later blocks at once."""
Arguments = dict[str, Any]
"""What a decoder layer is called with besides the hidden states."""


@torch.inference_mode()
def calibrate(
    source: Source,
    layers: Collection[str],
    windows: Tensor,
    advance: Callable[[], None] = lambda: None,
    rotation: int | None = None,
) -> Convert:
    """Rounds the weights of `layers` for a text.

    Args:
        windows: calibration tokens, int64 [n, window].
        advance: called after each linear layer.
        rotation: as of `round_to_nearest`; the text's inputs are rotated too.

    Raises:
        EvalError: the model has no list of decoder layers, or a weight or its inputs hold NaN or Inf.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    trusted = source.trust_remote_code
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto", trust_remote_code=trusted).eval()
    decoder = getattr(model.base_model, "layers", None)
    if decoder is None:
        raise EvalError(f"--method gptq does not know the layers of {type(model).__name__}; use --method rtn")
    for part in model.base_model.children():
        if part is not decoder:  # embedding and norms; layers become fp32 one at a time
            part.float()
    names = {module: name for name, module in model.named_modules()}
    hidden, by_layer = _layer_inputs(model, decoder, windows)
    rounded: dict[str, Int8Weight] = {}
    for layer, arguments in zip(decoder, by_layer, strict=True):
        layer.float()
        linears = {names[part]: part for part in layer.modules() if names[part] in layers}
        hessians, hidden = _run(layer, linears, hidden, arguments)
        for name, hessian in hessians.items():
            weight = linears[name].weight
            block = block_of(weight, rotation)
            rounded[f"{name}.weight"] = _round(rotate(weight, block), _rotate_hessian(hessian, block), name)
            advance()
        layer.to("meta")
    nearest = round_to_nearest(layers, rotation)
    return lambda name, tensor: rounded[name] if name in rounded else nearest(name, tensor)


@contextmanager
def _explained() -> Iterator[None]:
    """A layer that takes or returns more than hidden states fails in its own way."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        raise EvalError(
            f"--method gptq cannot run the model's layers one by one ({reason}); use --method rtn"
        ) from None


@_explained()
def _layer_inputs(model: Any, decoder: nn.ModuleList, windows: Tensor) -> tuple[list[Tensor], list[list[Arguments]]]:
    """What the first decoder layer sees, fp32 [n, window, hidden_size] a batch, and each layer's other arguments.

    The other arguments (rotary angles, mask) are one dictionary a batch.
    """
    calls: list[tuple[Tensor, Arguments]] = []

    def record(states: Tensor, **keywords: Any) -> Tensor:
        calls.append((states, keywords))
        return states

    for layer in decoder:
        layer.forward = record
    for tokens in windows.split(BATCH):
        model.base_model(tokens, use_cache=False)
    for layer in decoder:
        del layer.forward
    by_layer = [calls[index :: len(decoder)] for index in range(len(decoder))]
    return [states for states, _ in by_layer[0]], [[keywords for _, keywords in layer] for layer in by_layer]


@_explained()
def _run(
    layer: nn.Module, linears: dict[str, nn.Module], hidden: list[Tensor], arguments: list[Arguments]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Runs one decoder layer.

    Returns:
        X^T X, fp32 [K, K], of each linear's inputs X [tokens, K] (one tensor for linears that engines merge), and the
        layer's outputs.
    """
    sums: dict[str, Tensor] = {}

    def accumulate_into(name: str) -> Callable[..., None]:
        def accumulate(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            sums.setdefault(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

        return accumulate

    first = {name: _first_of_merged(name, linears) for name in linears}
    hooks = [linears[name].register_forward_pre_hook(accumulate_into(name)) for name in set(first.values())]
    outputs = [layer(states, **keywords) for states, keywords in zip(hidden, arguments, strict=True)]
    for hook in hooks:
        hook.remove()
    return {name: sums[leader] for name, leader in first.items()}, outputs


def _first_of_merged(name: str, linears: Collection[str]) -> str:
    """The first of `linears` that engines merge with this one, and which therefore sees the same inputs."""
    parent, _, kind = name.rpartition(".")
    merged = [f"{parent}.{part}" for parts in MERGED if kind in parts for part in parts]
    return next((part for part in merged if part in linears), name)


def _rotate_hessian(hessian: Tensor, block: int) -> Tensor:
    """X^T X of rotated inputs: H X^T X H, fp32 [K, K]."""
    return rotate(rotate(hessian, block).T, block)


def _round(weight: Tensor, hessian: Tensor, name: str) -> Int8Weight:
    if not hessian.isfinite().all():
        raise EvalError(f"{name}: its inputs on the calibration text hold NaN or Inf; a weight before it must be wrong")
    try:
        return round_compensated(weight, compensation(hessian), f"{name}.weight")
    except ValueError as error:
        raise EvalError(str(error)) from None


class Compensation(NamedTuple):
    """How to make up for a column's error in the columns after it."""

    order: Tensor
    """Columns in the order of rounding, int64 [K]."""
    upper: Tensor
    """Upper Cholesky factor of the inverse Hessian in that order, fp32 [K, K]."""


def compensation(hessian: Tensor) -> Compensation:
    """From a finite X^T X, fp32 [K, K]."""
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian.double()[order][:, order]
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return Compensation(order, torch.linalg.cholesky(inverse, upper=True).float())


def round_compensated(weight: Tensor, by: Compensation, name: str = "weight") -> Int8Weight:
    """Rounds a weight fp32 [N, K] with the scales of `quantize_rowwise`, to move its outputs least.

    Raises:
        ValueError: as `quantize_rowwise`.
    """
    scale = quantize_rowwise(weight, name=name).scale
    rest = weight[:, by.order]
    values = torch.empty_like(rest, dtype=torch.int8)
    for start in range(0, rest.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, rest.shape[1]))
        values[:, block], errors = _round_block(rest[:, block], by.upper[block, block], scale)
        rest[:, block.stop :] -= errors @ by.upper[block, block.stop :]
    return Int8Weight(values[:, by.order.argsort()], scale)


def _round_block(block: Tensor, upper: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds the columns [N, k] in turn; their values int8 [N, k] and errors / upper[j, j] fp32 [N, k]."""
    columns = block.T.clone()
    values, errors = torch.empty_like(columns, dtype=torch.int8), torch.empty_like(columns)
    limit = INT8_MAX * scale.float()
    for j, column in enumerate(columns):
        values[j] = round_to_scale(column.clamp(-limit, limit)[:, None], scale)[:, 0]
        errors[j] = (column - values[j] * scale.float()) / upper[j, j]
        columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return values.T, errors.T
