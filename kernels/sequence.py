"""Several operators that follow one another, as one: `rowint8::sequence`.

Outside CUDA graphs a short prompt is bound by the host. torch's way to an operator and what torch.compile writes around
its call take as long there as the operator's own launch; a sequence pays them once. It launches the same kernels.

A sequence is told as JSON, since torch.compile keeps graphs on disk: the steps, each an operator's name and its
arguments, and which values the sequence returns. Values are numbered: the tensors given, then the outputs of each step
in order. An argument [7] is value 7, a string a dtype, any other a constant.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.kernels.operators import OPERATORS


class Step(NamedTuple):
    """One operator."""

    name: str
    arguments: tuple[tuple[bool, Any], ...]
    """Whether each is a value, and its number or the constant."""
    last_used: tuple[int, ...] = ()
    """Outputs of steps that no later step reads, nor the caller."""


def told(steps: Iterable[tuple[str, Sequence[Any]]], results: Sequence[int]) -> str:
    """The JSON of steps whose arguments are `Value`s, dtypes and constants."""
    return json.dumps([[[name, [_told(each) for each in given]] for name, given in steps], list(results)])


class Value(NamedTuple):
    """A value as an argument."""

    number: int


def _told(argument: Any) -> Any:
    if isinstance(argument, Value):
        return [argument.number]
    return str(argument).removeprefix("torch.") if isinstance(argument, torch.dtype) else argument


@cache
def _read(told: str, tensors: int) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """The steps and the numbers of the results, of a sequence that is given so many tensors."""
    told_steps, results = json.loads(told)
    steps = [Step(name, tuple(_argument(each) for each in given)) for name, given in told_steps]
    later, read = {*range(tensors), *results}, []
    for step in reversed(steps):
        here = {number for is_value, number in step.arguments if is_value}
        read.append(step._replace(last_used=tuple(here - later)))
        later |= here
    return tuple(reversed(read)), tuple(results)


def _argument(given: Any) -> tuple[bool, Any]:
    if isinstance(given, list):
        return True, given[0]
    return False, getattr(torch, given) if isinstance(given, str) else given


def _run(call: Callable[..., Any], tensors: list[Tensor], told: str) -> list[Tensor]:
    """Runs the steps. `call` takes an operator's name and its arguments."""
    steps, results = _read(told, len(tensors))
    values: list[Any] = list(tensors)
    for name, arguments, last_used in steps:
        out = call(name, *[values[given] if is_value else given for is_value, given in arguments])
        values += out if isinstance(out, tuple) else (out,)
        for number in last_used:
            values[number] = None
    return [values[number] for number in results]


def _launch(name: str, *given: Any) -> Any:
    """The operator on CUDA, whose arguments were checked when the sequence was made for fake tensors like these."""
    operator = OPERATORS[name]
    return operator.run(operator.cuda, *given)


def _call(name: str, *given: Any) -> Any:
    return getattr(torch.ops.rowint8, name).default(*given)


_library = torch.library.Library("rowint8", "FRAGMENT")
_library.define("sequence(Tensor[] tensors, str told) -> Tensor[]")
torch.library.register_fake("rowint8::sequence", partial(_run, _call), lib=_library)
_library.impl("sequence", partial(_run, _call), "CPU")
_library.impl("sequence", partial(_run, _launch), "CUDA")
