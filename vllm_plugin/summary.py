"""One line of the log that says what rowint8 does to a model, when vLLM has built it."""

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from rowint8.vllm_plugin.loading import Int8Method
from rowint8.vllm_plugin.passes import not_fused

logger = init_logger(f"vllm.{__name__}")

_GIB = 2**30


def log_summary(model: nn.Module, config: Any) -> None:
    """Logs the line, once for a model. Sizes are those of this rank."""
    logger.info_once("rowint8: %s", "; ".join(summary(model, config)))


def summary(model: nn.Module, config: Any) -> list[str]:
    """What became INT8, the bytes of all weights before and after, the head, and what the compiler fuses."""
    before, after = sizes(model, config.model_config.dtype)
    size = f"{_layers(model, config)} in INT8, {before / _GIB:.2f} -> {after / _GIB:.2f} GiB"
    fused = {"SwiGLU": f"SwiGLU fused in {_plural(_swiglus(model), 'layer')}", "norms": "norms fused"}
    reasons = not_fused(config, config.quant_config.fuse_swiglu, config.quant_config.fuse_norm)
    fusions = (f"{what} not fused: {reason}" if reason else fused[what] for what, reason in reasons.items())
    activations = ["INT8 activations"] if config.quant_config.activations else []
    return [size, *activations, *_head(model), *fusions]


def sizes(model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the model's weights with those of INT8 layers in `dtype`, and in INT8 with their scales."""
    seen, before, after = set(), 0, 0
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in seen or name.endswith("_scale"):
                continue
            seen.add(id(parameter))
            if _is_int8(layer) and name.endswith("weight"):
                before += parameter.numel() * dtype.itemsize
                after += parameter.numel() + 2 * parameter.numel() // parameter.shape[-1]
            else:
                before, after = before + parameter.nbytes, after + parameter.nbytes
    return before, after


def _head(model: nn.Module) -> list[str]:
    """The dtype of the head, or of the embedding that is the head too."""
    layers = [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]
    layers = layers or [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    if not layers:
        return []
    dtype = "INT8" if _is_int8(layers[0]) else str(layers[0].params_dtype).removeprefix("torch.")
    return [f"head {dtype}"]


def _swiglus(model: nn.Module) -> int:
    """Blocks that hold a SwiGLU over an INT8 gate_up layer."""
    return sum(
        any(getattr(getattr(child, "quant_method", None), "is_gate_up", False) for child in block.children())
        and any(type(child) is SiluAndMul for child in block.children())
        for block in model.modules()
    )


def _layers(model: nn.Module, config: Any) -> str:
    """How many layers are INT8, merged ones counted by their parts, as the checkpoint has them."""
    packed, experts, linear = config.quant_config.packed_modules_mapping, 0, 0
    for name, layer in model.named_modules():
        if _is_int8(layer):
            experts += hasattr(layer, "w13_weight")
            linear += len(packed.get(name.rpartition(".")[2], ["itself"])) if isinstance(layer, LinearBase) else 0
    text = _plural(linear, "linear layer")
    return f"{text} and the experts of {_plural(experts, 'layer')}" if experts else text


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _is_int8(layer: Any) -> bool:
    return isinstance(getattr(layer, "quant_method", None), Int8Method)
