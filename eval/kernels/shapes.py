"""The sizes that kernels are timed at: linear layers and RMSNorms of models people run, and numbers of tokens."""

from typing import Literal, NamedTuple

from rowint8.eval.errors import EvalError

Op = Literal["linear", "swiglu", "add_rms_norm"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Shape(NamedTuple):
    """A weight [N, K] that the products are timed with, or a hidden size N = K of `add_rms_norm`."""

    name: str
    n: int
    k: int
    ops: tuple[Op, ...] = ("linear",)


def _layer(qkv: tuple[int, int], o: tuple[int, int], gate_up: tuple[int, int], down: tuple[int, int]) -> list[Shape]:
    """What a decoder layer multiplies by; q, k, v and gate, up are stacked."""
    products = [Shape("qkv", *qkv), Shape("o", *o), Shape("gate_up", *gate_up, ("linear", "swiglu"))]
    hidden = down[0]
    return [*products, Shape("down", *down), Shape(f"h{hidden}", hidden, hidden, ("add_rms_norm",))]


_MODELS = {
    "llama-3.1-8b": _layer(qkv=(6144, 4096), o=(4096, 4096), gate_up=(28672, 4096), down=(4096, 14336)),
    "qwen2.5-0.5b": _layer(qkv=(1152, 896), o=(896, 896), gate_up=(9728, 896), down=(896, 4864)),
    "qwen2.5-1.5b": _layer(qkv=(2048, 1536), o=(1536, 1536), gate_up=(17920, 1536), down=(1536, 8960)),
    "llama-3.1-70b-tp8": _layer(qkv=(1280, 8192), o=(8192, 1024), gate_up=(7168, 8192), down=(8192, 3584)),
}
"""The last as one of 8 GPUs holds it (tensor parallelism)."""

DEFAULT_MODEL = "llama-3.1-8b"


def _named() -> dict[str, list[Shape]]:
    sets: dict[str, list[Shape]] = {}
    for model, layer in _MODELS.items():
        prefix = "" if model == DEFAULT_MODEL else f"{model}/"
        sets[model] = [shape._replace(name=prefix + shape.name) for shape in layer]
    sets["lm_head"] = [Shape("lm_head", 128256, 4096)]
    return sets | {shape.name: [shape] for layer in list(sets.values()) for shape in layer}


SHAPES = _named()
"""Name to shapes: models name all of theirs; single ones are "gate_up" (of the default model), "qwen2.5-0.5b/qkv"."""


def select_shapes(names: str) -> list[Shape]:
    """The shapes that comma-separated names stand for, each once.

    Raises:
        EvalError: a name is unknown.
    """
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in SHAPES]:
        accepted = ", ".join(name for name in SHAPES if "/" not in name)
        raise EvalError(
            f"--shapes has {', '.join(unknown)}; accepted are {accepted}, and single shapes of the other models as "
            "in qwen2.5-0.5b/gate_up"
        )
    return list(dict.fromkeys(shape for name in chosen for shape in SHAPES[name]))


def is_count(text: str) -> bool:
    """Whether it is a whole number above 0, in plain digits."""
    return text.isascii() and text.isdecimal() and int(text) > 0


def parse_tokens(text: str) -> tuple[int, ...]:
    """Comma-separated numbers of tokens.

    Raises:
        EvalError: one is no whole number above 0.
    """
    parts = text.split(",")
    if bad := [part for part in parts if not is_count(part)]:
        raise EvalError(f"--tokens has {', '.join(map(repr, bad))}; give whole numbers above 0, such as 1,16,128")
    return tuple(map(int, parts))
