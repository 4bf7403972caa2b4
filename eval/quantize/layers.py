"""Which layers of a model become INT8: those that vLLM builds quantized, less those that the user names.

transformers says which linear layers a config describes. vLLM builds some of them unquantized, and would not load INT8
into them: what chooses among experts, the state space mixers of the first Mamba, all that reads images and sound. They
stay as they are.
"""

import difflib
import re
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from rowint8.baseline_engine.errors import one_line, shown
from rowint8.eval.errors import EvalError

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines merge into one, and that must therefore be quantized or not together."""

_UNQUANTIZED = re.compile(r"(.*\.)?(gate|router|classifier|shared_expert_gate)")
_OTHER_SENSES = re.compile(r"vision|visual|image|img|audio|speech|embed")
_MATCH_SECONDS = 2


def linear_layers(model: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the linear layers of a causal language model of transformers: those that become INT8, and the others.

    The output layer is in neither.
    """
    head, decoder = model.get_output_embeddings(), set(model.get_decoder().modules())
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}
    taken = {name for name, part in linears.items() if part in decoder and _is_quantized(name, linears)}
    return frozenset(taken), frozenset(linears.keys() - taken)


def _is_quantized(name: str, linears: Collection[str]) -> bool:
    """Whether vLLM builds a linear layer of a decoder quantized. The first Mamba's mixer is known by its dt_proj."""
    in_first_mamba = f"{name.rpartition('.')[0]}.dt_proj" in linears
    return not (in_first_mamba or _UNQUANTIZED.fullmatch(name) or _OTHER_SENSES.search(name))


def ignored_layers(layers: Collection[str], ignore: Sequence[str]) -> frozenset[str]:
    """Those of `layers` that `ignore` names: in full, or by "re:" and a pattern that matches from the start.

    Raises:
        EvalError: an entry is no regular expression or matches nothing, only a part of a merged layer is ignored, or
            all layers are.
    """
    found: set[str] = set()
    for entry in ignore:
        found |= _named_by(entry, layers)
    for layer in sorted(found):
        _check_merged(layer, layers, found)
    if len(found) == len(layers):
        raise EvalError("--ignore names all linear layers that INT8 is for, so that nothing would be quantized")
    return frozenset(found)


def _named_by(entry: str, layers: Collection[str]) -> set[str]:
    given, is_pattern = f"--ignore {shown(entry)}", entry.startswith("re:")
    matches = _matching(entry.removeprefix("re:"), given, layers) if is_pattern else {entry} & set(layers)
    if matches:
        return matches
    if not is_pattern and set(entry) & set("*?[]"):
        raise EvalError(f"{given}: a plain name has no wildcards; give a pattern such as 're:.*down_proj'")
    near = difflib.get_close_matches(entry[:200], sorted(layers), 1, 0) or [min(layers)]
    raise EvalError(f"{given} matches no linear layer; layers are named like {near[0]!r}")


def _matching(pattern: str, given: str, layers: Collection[str]) -> set[str]:
    try:
        compiled = re.compile(pattern)
        with time_limit(_MATCH_SECONDS):
            return {layer for layer in layers if compiled.match(layer)}
    except TimeoutError:
        raise EvalError(f"{given} takes too long to match; give a pattern without nested repetitions") from None
    except (re.error, OverflowError, RecursionError) as error:
        raise EvalError(f"{given} is not a regular expression: {one_line(error)}") from None


def _check_merged(layer: str, layers: Collection[str], ignored: Collection[str]) -> None:
    parent, _, kind = layer.rpartition(".")
    for parts in MERGED:
        siblings = [f"{parent}.{part}" for part in parts] if kind in parts else []
        rest = [name for name in siblings if name in layers and name not in ignored]
        if rest:
            raise EvalError(f"--ignore names {layer} but not {', '.join(rest)}; engines merge them: ignore all or none")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block of Python or of `re` that takes longer; only the main thread can be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
