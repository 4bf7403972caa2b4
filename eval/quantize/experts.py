"""The experts of a checkpoint: which tensors they are, by which names they are written, and what stands for them.

Files hold either each expert's layers on their own, `<block>.experts.3.gate_proj.weight` [N, K], or all of a layer in
one tensor, `<block>.experts.gate_up_proj` [E, 2I, H] and `.down_proj` [E, H, I]. INT8 is always written in the first
way. For users and in config.json all experts of a layer are one layer, `<block>.experts`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from rowint8.eval.errors import EvalError

_ALONE = re.compile(r"(.*\.experts)\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_OF_EXPERTS = re.compile(r"(.*\.experts)\..+")

Header = Mapping[str, tuple[tuple[int, ...], str]]
"""Name -> (shape, safetensors dtype)."""


def layer_of(name: str) -> str:
    """The layer that a weight belongs to: all experts of a layer are one."""
    alone = _ALONE.fullmatch(name)
    return alone[1] if alone else name.removesuffix(".weight")


def expert_layers(header: Header) -> frozenset[str]:
    """Names of the layers of experts in the files.

    Raises:
        EvalError: experts have other parts than a SwiGLU's three weights, or lie in memory in another order.
    """
    found = set()
    for name, (shape, _) in header.items():
        match = _OF_EXPERTS.fullmatch(name)
        if match is None:
            continue
        if not (_ALONE.fullmatch(name) or _STACKED.fullmatch(name)):
            raise EvalError(f"{name} is a part of experts that INT8 is not written for; {_ADVICE}")
        if _STACKED.fullmatch(name) and not _is_by_rows(match[1], header):
            raise EvalError(f"{name} {list(shape)} is not [E, 2I, H] or [E, H, I] beside the other; {_ADVICE}")
        found.add(match[1])
    return frozenset(found)


_ADVICE = "vLLM quantizes what it can of this model while loading, with --quantization rowint8"


def _is_by_rows(block: str, header: Header) -> bool:
    """Whether stacked weights have outputs before inputs."""
    shapes = [header.get(f"{block}.{part}", ((), ""))[0] for part in ("gate_up_proj", "down_proj")]
    if not all(len(shape) == 3 for shape in shapes):
        return False
    (experts, rows, hidden), (e, h, i) = shapes
    return (experts, rows, hidden) == (e, 2 * i, h)


def apart(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of the files as it is written: stacked experts each on their own, any other as it is."""
    stacked = _STACKED.fullmatch(name)
    if stacked is None:
        yield name, tensor
        return
    block, kind = stacked.groups()
    for expert, weight in enumerate(tensor):
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for part, rows in zip(kinds, weight.chunk(len(kinds)), strict=True):
            yield f"{block}.{expert}.{part}.weight", rows


def in_model(model: Any, header: Header) -> dict[str, tuple[tuple[int, ...], str]]:
    """The header by the names of transformers' model, with the shapes there: experts stacked."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_checkpoint_conversion_mapping(model.config.model_type) or []
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, (shape, dtype) in header.items():
        renamed, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None and _ALONE.fullmatch(name):
            parts.setdefault(renamed, []).append((pattern, shape))
            shape = _stacked(name, parts[renamed])
        found[renamed] = shape, dtype
    return found


def _stacked(name: str, parts: list[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """The shape of all experts' layers together, the last of which is `name`."""
    (_, first), (_, shape) = parts[0], parts[-1]
    if shape != first or len(shape) != 2:
        raise EvalError(f"{name} has shape {list(shape)}; other experts have {list(first)}")
    kinds = len({kind for kind, _ in parts})
    return len(parts) // kinds, kinds * shape[0], shape[1]
