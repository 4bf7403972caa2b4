"""Kernels are compiled while the model loads, so that no request waits for one (see `kernels/warmup.py`).

vLLM's own warm-up runs a few numbers of tokens; others, up to `max_num_batched_tokens`, may take other kernels.
"""

from functools import cache
from typing import Any

import torch
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def warm_up(method: Any, layer: Any) -> None:
    """Makes ready what a layer with its `RowInt8LinearMethod` may launch, once for all layers of a shape; on GPUs."""
    weight = layer.weight
    if weight.device.type == "cuda":
        has_bias = applies_bias(layer, method.k_is_split)
        n, k = weight.shape
        kind = "_int8" if method.block else ""
        launched = [(f"linear{kind}", n, k, has_bias)]
        if method.is_gate_up:
            launched.append((f"swiglu{kind}", n, k, False))
        if method.block:
            launched.append(("quantize_tokens", method.block, k, False))
        ready(tuple(launched), method.dtype, weight.device, method.max_tokens)


def applies_bias(layer: Any, k_is_split: bool) -> bool:
    """Whether vLLM hands the layer's bias to `apply`. Of a layer split along K, the first rank alone adds it."""
    elsewhere = getattr(layer, "skip_bias_add", False) or (k_is_split and layer.tp_rank > 0)
    return getattr(layer, "bias", None) is not None and not elsewhere


@cache
def ready(launched: tuple[tuple, ...], dtype: torch.dtype, device: torch.device, max_tokens: int) -> None:
    """Compiles what is launched, arguments of `kernels.warmup.WeightShape`, for up to so many tokens."""
    from rowint8.kernels.warmup import WeightShape, warmup

    shapes = [WeightShape(*given) for given in launched]
    kernels, seconds = warmup(shapes, dtype, device, max_tokens)
    names = ", ".join(f"{shape.op} [{shape.n}, {shape.k}]" for shape in shapes)
    logger.info("rowint8: %d kernels are ready after %.1f s, for %s", kernels, seconds, names)


def warm_up_experts(method: Any, layer: Any, activation: tuple) -> None:
    """Makes ready what the experts of a layer may launch, once for all layers of a shape; on GPUs."""
    tensors = layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale
    shape = tuple(layer.w13_weight.shape)
    if layer.w13_weight.device.type != "cuda" or (shape, method.blocks) in _ready_experts:
        return
    from rowint8.kernels.experts.hopper import Rotation
    from rowint8.kernels.experts.warmup import warmup

    _ready_experts.add((shape, method.blocks))
    sizes = method.moe.experts_per_token, method.dtype, method.max_tokens
    rotation = Rotation(*method.blocks) if method.blocks else None
    tiles, seconds = warmup(tensors, *sizes, layer.expert_map, activation, rotation)
    logger.info("rowint8: kernels for %d tiles of experts are ready after %.1f s, for %s", tiles, seconds, list(shape))


_ready_experts: set[tuple] = set()
"""Shapes of gate_up, each with the blocks of the rotation."""
