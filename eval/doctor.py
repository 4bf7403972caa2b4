"""What this machine and a model allow, without running the model: the facts behind `rowint8 doctor`."""

import importlib.util
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rowint8.eval.errors import EvalError
from rowint8.eval.processes import run_worker, vllm_environment

if TYPE_CHECKING:
    from rowint8.eval.quantize.sizes import ModelSizes

CEILINGS = {"NVIDIA H100 80GB HBM3": 3.09, "NVIDIA H200": 4.46}
"""Card to the highest rate of reading that `rowint8 bench kernels` has found on it, TB/s."""
LAYER_US = 40.0
"""What a decoder layer takes besides reading its weights, in vLLM with one request: it meets the times of Llama-3.1-8B
on the H200 within a tenth (results/vllm-*h200.json)."""
FP8 = (8, 9)
"""The compute capability from which on tensor cores multiply FP8."""
NARROW = 2048
"""Below this hidden size (models of 0.5B and 1.5B) bf16 was faster from 32 tokens a step on."""
LITTLE = 0.75
"""From this share of bf16's bytes on, INT8 layers save little."""
_USABLE = 0.9
"""Share of a card's memory that vLLM takes."""
_GENERATIONS = {8: "Ampere", 9: "Hopper", 10: "Blackwell", 11: "Blackwell", 12: "Blackwell"}
_TOKENS = {"1": 1, "2 to 8": 8, "9 and more": 9}
"""Numbers of tokens that share a kernel, and one of them."""
_VLLM_SECONDS = 180.0


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees, and how many of its kind."""

    name: str
    count: int
    capability: tuple[int, int]
    generation: str
    memory_bytes: int
    kernels: dict[str, str]
    """Numbers of tokens, such as "2 to 8", to the kernel of their products; empty where there is none."""
    no_int8_activations: str | None
    """Why products of INT8 activations are not for this card; None where they are."""


@dataclass(frozen=True)
class Estimate:
    """How fast one request decodes, at best and about, in tokens per second."""

    card: str
    form: str
    """One of `sizes.FORMS`."""
    at_most: float
    """All that a token reads is read once, at the card's CEILINGS, and nothing else takes time."""
    about: float
    """Each layer takes LAYER_US besides."""


def gpus() -> list[Gpu]:
    """The kinds of GPUs here; empty on a CPU."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    counts, first = Counter(each.name for each in found), {}
    for index, each in enumerate(found):
        first.setdefault(each.name, (each, torch.device("cuda", index)))
    return [_gpu(each, counts[name], device) for name, (each, device) in first.items()]


def _gpu(properties, count: int, device) -> Gpu:
    from rowint8.kernels.tiles.card import why_weight_only

    capability = (properties.major, properties.minor)
    return Gpu(
        name=properties.name,
        count=count,
        capability=capability,
        generation=generation(capability),
        memory_bytes=properties.total_memory,
        kernels=_kernels(device) if capability >= (8, 0) else {},
        no_int8_activations=why_weight_only(device),
    )


def generation(capability: tuple[int, int]) -> str:
    """NVIDIA's name for cards of a compute capability."""
    if capability < (8, 0):
        return "older than Ampere"
    return "Ada" if capability == FP8 else _GENERATIONS.get(capability[0], "newer than Blackwell")


def _kernels(device) -> dict[str, str]:
    """The kernels that shipped tiles choose for gate and up of an 8B model."""
    from rowint8.kernels.tiles.card import card_of
    from rowint8.kernels.tiles.pick import Product, pick_tile
    from rowint8.kernels.tiles.types import FewTokensTile, HopperTile

    names = {FewTokensTile: "Gluon, few tokens", HopperTile: "Gluon, Hopper (TMA, wgmma)"}
    products = {tokens: Product("linear", m, 28672, 4096, 2, True) for tokens, m in _TOKENS.items()}
    card = card_of(device)
    return {tokens: names.get(type(pick_tile(product, card)), "Triton") for tokens, product in products.items()}


def plugin_problem() -> str | None:
    """Why `vllm serve --quantization rowint8` cannot work here; None where vLLM knows the method.

    It imports vLLM in another process, which takes seconds.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; run `pip install 'rowint8[vllm]'`"
    try:
        known = run_worker(quantization_methods, {}, vllm_environment(), _VLLM_SECONDS)
    except EvalError as error:
        return f"vLLM cannot be imported: {str(error).splitlines()[0]}"
    if "rowint8" in known:
        return None
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "rowint8" not in plugins.split(","):
        return f"VLLM_PLUGINS is {plugins!r} and does not name rowint8; unset it or add the name"
    return "vLLM does not find the plugin; install rowint8 with pip in vLLM's environment"


def quantization_methods() -> list[str]:
    """The methods that vLLM knows once it has loaded its plugins; for a process of its own."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return list(QUANTIZATION_METHODS)


def estimates(sizes: "ModelSizes", found: list[Gpu]) -> list[Estimate]:
    """How fast the cards here decode whose ceiling was measured; where there is none, all that were."""
    cards = {gpu.name for gpu in found} & CEILINGS.keys() or CEILINGS.keys()
    limits_s = {(card, form): sizes.read[form] / CEILINGS[card] / 1e12 for card in sorted(cards) for form in sizes.read}
    besides_s = sizes.decoder_layers * LAYER_US / 1e6
    return [
        Estimate(card, form, at_most=1 / limit_s, about=1 / (limit_s + besides_s))
        for (card, form), limit_s in limits_s.items()
    ]


def advice(sizes: "ModelSizes", found: list[Gpu]) -> list[str]:
    """What speaks for another method than this one, a sentence each."""
    lines = []
    if sizes.quantized_by == "rowint8":
        lines.append("The checkpoint is in INT8 already: serve it without a flag.")
    elif sizes.quantized_by:
        lines.append(
            f"The checkpoint is quantized already ({sizes.quantized_by}): serve it as it is, or its bf16 original "
            "with rowint8. Sizes are the original's."
        )
    if any(gpu.capability >= FP8 for gpu in found) or not found:
        lines.append(
            "Mostly 128 requests at once or more, or long prompts, on a card with FP8 units: FP8 is faster "
            "(--quantization fp8_per_channel, or fp8 in an old vLLM)."
        )
    else:
        lines.append("Mostly 128 requests at once or more, or long prompts: INT8 weights gain no time.")
    if sizes.hidden_size < NARROW:
        lines.append("Narrow layers: bf16 is faster from 32 requests at once on.")
    share = sizes.weights["rowint8"] / sizes.weights["bf16"]
    if share > LITTLE:
        lines.append(
            f"INT8 leaves {share:.0%} of the bytes, as most are no linear layers; the option lm_head saves more where "
            "the head is large."
        )
    return lines + _memory_advice(sizes, found)


def _memory_advice(sizes: "ModelSizes", found: list[Gpu]) -> list[str]:
    usable = max((gpu.memory_bytes * _USABLE for gpu in found), default=0.0)
    if not usable or sizes.weights["rowint8"] <= usable:
        return []
    cards = -(-sizes.weights["rowint8"] // int(usable))
    return [f"One card is too small: --tensor-parallel-size {cards} or more, or a method of four bits."]
