"""The sizes that kernels are timed at: linear layers and RMSNorms of models people run, and numbers of tokens."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from rowint8.eval.errors import EvalError
from rowint8.eval.models import DEFAULT_MODEL, MODELS, layer_weights

WeightOp = Literal["linear", "swiglu", "add_rms_norm"]
Int8Op = Literal["linear_int8", "swiglu_int8"]
WEIGHT_OPS: tuple[str, ...] = get_args(WeightOp)
INT8_FORMS: dict[str, Int8Op] = {"linear": "linear_int8", "swiglu": "swiglu_int8"}
"""Weight-only operator to the one that multiplies INT8 tokens."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_REMAINDERS = (33, 40, 48, 56, 65, 72, 80, 96, 112, 129, 144, 160, 192, 200, 224, 257, 288, 320, 384, 448)
_REMAINDERS += (513, 576, 640, 768, 1000, 1100, 1500, 2500, 3000, 6000)
EVERY_COUNT = tuple(sorted({*range(1, 33), *_REMAINDERS, *TOKENS}))
"""What a server meets: every small number of tokens, then every kind of remainder of a tile."""
FEW_COUNTS = (1, 4, 8, 16, 24, 32, 64, 96, 128, 256)
"""Where peers that compile and tune for minutes are timed, on the shapes of `DEFAULT_MODEL`."""
CHAIN_COUNTS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 65, 96, 128, 129, 160, 192, 256, 300, 513, 1100, 3000)


class Shape(NamedTuple):
    """A weight [N, K] that the products are timed with, or a hidden size N = K of `add_rms_norm`."""

    name: str
    n: int
    k: int
    ops: tuple[WeightOp, ...] = ("linear",)


_TIMED = {"llama-3.1-8b": 1, "qwen2.5-0.5b": 1, "qwen2.5-1.5b": 1, "qwen2.5-7b": 1, "llama-3.1-70b": 8}
"""Model to the GPUs that share it; one of them holds the shapes."""
_GEMMA_2_9B = dict(
    hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_key_value_heads=8, head_dim=256
)
"""Its MLP is GeGLU and its norm adds 1 to the weight, so that `linear` alone serves it."""


def _layer(model: str, prefix: str) -> list[Shape]:
    """What a decoder layer multiplies by, and its norm."""
    config = MODELS[model]
    hidden = config["hidden_size"]
    products = [
        Shape(prefix + name, n, k, ("linear", "swiglu") if name == "gate_up" else ("linear",))
        for name, (n, k) in layer_weights(config, _TIMED[model]).items()
    ]
    return [*products, Shape(f"{prefix}h{hidden}", hidden, hidden, ("add_rms_norm",))]


def _named() -> dict[str, list[Shape]]:
    sets: dict[str, list[Shape]] = {}
    for model, ranks in _TIMED.items():
        name = model if ranks == 1 else f"{model}-tp{ranks}"
        sets[name] = _layer(model, "" if model == DEFAULT_MODEL else f"{name}/")
    sets["gemma-2-9b"] = [Shape(f"gemma-2-9b/{name}", n, k) for name, (n, k) in layer_weights(_GEMMA_2_9B).items()]
    default = MODELS[DEFAULT_MODEL]
    sets["lm_head"] = [Shape("lm_head", default["vocab_size"], default["hidden_size"])]
    return sets | {shape.name: [shape] for layer in list(sets.values()) for shape in layer}


SHAPES = _named()
"""Name to shapes: models name all of theirs; single ones are "gate_up" (of the default model), "qwen2.5-0.5b/qkv"."""


class ExpertsShape(NamedTuple):
    """A layer of experts."""

    name: str
    experts: int
    topk: int
    hidden: int
    intermediate: int


def _experts(model: str) -> ExpertsShape:
    config = MODELS[model]
    experts = config.get("num_experts") or config["num_local_experts"]
    intermediate = config.get("moe_intermediate_size") or config["intermediate_size"]
    return ExpertsShape(model, experts, config["num_experts_per_tok"], config["hidden_size"], intermediate)


EXPERTS = {model: _experts(model) for model in ("qwen3-30b-a3b", "mixtral-8x7b")}
"""Name to the layer of a mixture of experts that `ops.experts` is timed with."""
EXPERTS_COUNTS = (1, 8, 32, 128, 256, 1024, 8192)


def select_experts(names: str) -> list[ExpertsShape]:
    """The layers that comma-separated names stand for.

    Raises:
        EvalError: a name is unknown.
    """
    if unknown := [name for name in names.split(",") if name not in EXPERTS]:
        raise EvalError(f"--shapes has {', '.join(unknown)}; with --op experts accepted are {', '.join(EXPERTS)}")
    return [EXPERTS[name] for name in names.split(",")]


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


def parse_ops(text: str) -> list[str]:
    """Comma-separated names of WEIGHT_OPS and INT8_FORMS.

    Raises:
        EvalError: one is unknown.
    """
    known = [*WEIGHT_OPS, *INT8_FORMS.values()]
    if unknown := [name for name in text.split(",") if name not in known]:
        raise EvalError(f"--op has {', '.join(unknown)}; accepted are {', '.join(known)}")
    return text.split(",")


def shapes_with(shapes: list[Shape], ops: Callable[[str], bool]) -> list[Shape]:
    """The shapes with those of their operators that `ops` holds; without shapes that have none of them."""
    kept = [shape._replace(ops=tuple(filter(ops, shape.ops))) for shape in shapes]
    return [shape for shape in kept if shape.ops]


def is_count(text: str) -> bool:
    """Whether it is a whole number above 0, in at most nine plain digits."""
    return text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) > 0


def parse_tokens(text: str) -> tuple[int, ...]:
    """Comma-separated numbers of tokens.

    Raises:
        EvalError: one is no whole number above 0, or has more than nine digits.
    """
    parts = text.split(",")
    if bad := [part for part in parts if not is_count(part)]:
        raise EvalError(f"--tokens has {', '.join(map(repr, bad))}; give whole numbers above 0, such as 1,16,128")
    return tuple(map(int, parts))
