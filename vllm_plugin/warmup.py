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
        ops = ("linear", "swiglu") if method.is_gate_up else ("linear",)
        has_bias = applies_bias(layer, method.k_is_split)
        ready(ops, *weight.shape, has_bias, method.dtype, weight.device, method.max_tokens)


def applies_bias(layer: Any, k_is_split: bool) -> bool:
    """Whether vLLM hands the layer's bias to `apply`. Of a layer split along K, the first rank alone adds it."""
    elsewhere = getattr(layer, "skip_bias_add", False) or (k_is_split and layer.tp_rank > 0)
    return getattr(layer, "bias", None) is not None and not elsewhere


@cache
def ready(
    ops: tuple, n: int, k: int, has_bias: bool, dtype: torch.dtype, device: torch.device, max_tokens: int
) -> None:
    """Compiles what `ops` may launch for an [n, k] weight, or a norm's [k] where n = k, and up to so many tokens."""
    from rowint8.kernels.warmup import WeightShape, warmup

    weights = [WeightShape(op, n, k, has_bias and op == "linear") for op in ops]
    kernels, seconds = warmup(weights, dtype, device, max_tokens)
    logger.info("rowint8: %d kernels for [%d, %d] weights are ready after %.1f s", kernels, n, k, seconds)
