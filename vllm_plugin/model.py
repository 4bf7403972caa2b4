"""What the plugin changes in vLLM's settings for a model: its compiler pass, and who computes its norms.

Nothing else in the plugin touches either. vLLM has no hook for a model that it builds, so the first INT8 layer that
gets its weights calls `prepare_model`, and each later one calls it again.
"""

from typing import Any

import torch
from vllm import ir
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from rowint8.vllm_plugin.norm import PROVIDER
from rowint8.vllm_plugin.swiglu_fusion import SwigluFusion
from rowint8.vllm_plugin.warmup import ready

logger = init_logger(f"vllm.{__name__}")


def prepare_model(config: Any, fuse_norm: bool = False, gate_up: tuple[int, int] | None = None) -> None:
    """Prepares the model being built for one of its INT8 layers. Repeating it counts gate_up layers, nothing else.

    Args:
        config: vLLM's config of the model.
        fuse_norm: whether `rowint8::add_rms_norm` comes before vLLM's native code.
        gate_up: shape [2I, K] of the layer's weight, if it is a gate_up layer whose SwiGLU may be fused.
    """
    if fuse_norm:
        _prefer_norm(config)
    if gate_up:
        _fuse_swiglu(config, gate_up)


def _fuse_swiglu(config: Any, gate_up: tuple[int, int]) -> None:
    passes = config.compilation_config.inductor_compile_config
    installed = passes.get(current_platform.pass_key)
    if isinstance(installed, SwigluFusion):
        installed.gate_ups.append(gate_up)
        return
    obstacle = _obstacle(config, installed)
    if obstacle:
        logger.info_once(f"rowint8: SwiGLU is not fused: {obstacle}")
    else:
        passes[current_platform.pass_key] = SwigluFusion(config.model_config.dtype, [gate_up])


def _obstacle(config: Any, installed: Any) -> str | None:
    """Why no pass can be installed in this model's compilation, if so."""
    if config.compilation_config.mode == CompilationMode.NONE:
        return "the model is not compiled"
    if config.lora_config is not None:
        return "LoRA adds to its inputs"
    if installed is not None:
        return f"{current_platform.pass_key} is taken by {installed!r}"
    return None


def _prefer_norm(config: Any) -> None:
    """Puts the provider of `norm` before vLLM's native code in the model's order, and makes its kernel ready."""
    priorities = config.kernel_config.ir_op_priority
    order = priorities.fused_add_rms_norm
    if config.compilation_config.mode == CompilationMode.NONE:
        logger.info_once("rowint8: sum and norm are left to vLLM: the model is not compiled")
    elif order[0] == "native":
        priorities.fused_add_rms_norm = [PROVIDER, *order]
        ir.ops.fused_add_rms_norm.set_default(priorities.fused_add_rms_norm)
        if current_platform.is_cuda():
            model, device = config.model_config, torch.device("cuda", torch.cuda.current_device())
            size = model.get_hidden_size()
            ready(("add_rms_norm",), size, size, False, model.dtype, device, 1)
        logger.info_once("rowint8: for sum and norm its kernel comes before vLLM's native code")
    elif order[0] != PROVIDER:
        logger.info_once("rowint8: sum and norm are left to %s, which ir_op_priority names first", order[0])
