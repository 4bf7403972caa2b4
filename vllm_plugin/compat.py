"""What the installed vLLM has. No other file of the plugin asks for its version, or whether a part of it is there."""

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from vllm import envs
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

OLDEST, NEWEST = "0.26", "0.33"
"""The versions of vLLM between which the plugin is tested, both included."""

try:  # in vLLM versions whose CPU build has no router, a method for experts chooses them itself
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import (  # pyright: ignore[reportMissingImports]
        select_experts,
    )
except ImportError:
    select_experts = None


def note_version(version: str) -> None:
    """Logs a line for a vLLM older or newer than those that are tested. Builds from source have no usable number."""
    try:
        release = Version(version).release[:2]
    except InvalidVersion:
        return
    if release[0] == 0 and release[1] < 10:
        return
    if not Version(OLDEST).release <= release <= Version(NEWEST).release:
        logger.info_once("rowint8: tested with vLLM %s to %s; this is %s", OLDEST, NEWEST, version)


def norm_operator() -> Any | None:
    """vLLM's own operator for sum and norm, where its IR has one: (x, residual, weight, eps, ...) -> (normed, sum)."""
    try:
        from vllm import ir
    except ImportError:
        return None
    operator = getattr(ir.ops, "fused_add_rms_norm", None)
    return None if operator is None else operator.torch_op


def preferred_norm(config: Any) -> str:
    """Who computes sum and norm by the user's choice or vLLM's: "native" is what torch.compile makes of them."""
    priorities = getattr(config.kernel_config, "ir_op_priority", None)
    order = getattr(priorities, "fused_add_rms_norm", None) or ["native"]
    return order[0]


def refuses_quantized_experts(layer: Any) -> bool:
    """Whether the class of the experts takes unquantized weights alone, as that for pruned checkpoints does."""
    try:
        from vllm.model_executor.layers.fused_moe.expert_substitution import (  # pyright: ignore[reportMissingImports]
            SubstitutedRoutedExperts,
        )
    except ImportError:
        return False
    return isinstance(layer, SubstitutedRoutedExperts)


def quantizes_head_for_drafter(config: Any) -> bool:
    """Whether vLLM makes a quantized copy of the head for a drafter, for which the head must not be quantized."""
    return getattr(config.speculative_config, "draft_lm_head_quantization", None) is not None


def quantized_by_vllm(config: Any, layer: Any, prefix: str) -> bool:
    """Whether vLLM quantizes the layer itself, as `--quantization-config` asks, where rowint8 leaves it alone.

    Raises:
        ValueError: it asks for another dtype of activations, which vLLM would forget beside a method of a plugin.
    """
    online = getattr(config, "online_quantization_config", None)
    if online is None:
        return False
    for kind in ("linear", "moe"):
        spec = getattr(online.args, kind)
        if spec is not None and spec.weight is None:
            raise ValueError(f"rowint8: --quantization-config sets {kind} without a weight, which changes nothing")
    online.packed_modules_mapping = config.packed_modules_mapping
    return online.resolve_quant_method_cls(type(layer), prefix) is not None


def batch_invariant() -> bool:
    """Whether the user wants the same bits for a request in every batch (VLLM_BATCH_INVARIANT=1)."""
    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))


def builtin_silu_and_mul() -> Callable | None:
    """vLLM's compiled SiLU-and-product, if its extension is loaded."""
    packet = getattr(torch.ops._C, "silu_and_mul", None)
    return None if packet is None else packet.default
