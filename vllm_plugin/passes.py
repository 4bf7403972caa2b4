"""What the plugin changes in vLLM's settings for a model: the passes that its compiler runs.

Nothing else in the plugin touches them. vLLM has no hook for a model that it builds, so the first INT8 layer that gets
its weights calls `prepare_model`, and each later one calls it again.
"""

from typing import Any

import torch
from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from rowint8.kernels.activations import rotation_block
from rowint8.vllm_plugin import compat
from rowint8.vllm_plugin.norm_fusion import NormFusion
from rowint8.vllm_plugin.sequences import Sequences
from rowint8.vllm_plugin.swiglu_fusion import SwigluFusion
from rowint8.vllm_plugin.warmup import ready

logger = init_logger(f"vllm.{__name__}")


class Passes(InductorPass):
    """The plugin's passes over one model: vLLM has a place for one.

    Args:
        options: what the user chose. Some choices change the graph that vLLM caches, which has no other way to know.
    """

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.options = options or {}
        self.norm: NormFusion | None = None
        self.swiglu: SwigluFusion | None = None
        self.sequences = Sequences()

    def __call__(self, graph: fx.Graph) -> None:
        share_rounded(graph)
        for each in (self.norm, self.swiglu, self.sequences):
            if each:
                each(graph)

    def uuid(self) -> str:
        passes = [each and each.uuid() for each in (self.norm, self.swiglu, self.sequences)]
        sharing = self.hash_source(share_rounded)
        return self.hash_dict({"passes": passes, "sharing": sharing, "options": self.options})


def share_rounded(graph: fx.Graph) -> None:
    """Lets layers that read the same tokens round them once."""
    first: dict[tuple, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.rowint8.quantize_tokens.default):
        rounded = first.setdefault(node.args, node)
        if rounded is not node:
            node.replace_all_uses_with(rounded)
            graph.erase_node(node)


def prepare_model(vllm_config: Any, config: Any, gate_up: tuple[int, int] | None = None) -> None:
    """Prepares the model being built for one of its INT8 layers. Repeating it counts gate_up layers, nothing else.

    Args:
        vllm_config: vLLM's config of the model.
        config: the `RowInt8Config`, what the user chose.
        gate_up: shape [2I, K] of the layer's weight, if it is a gate_up layer whose SwiGLU may be fused.
    """
    passes = _passes(vllm_config, config)
    if passes is None:
        return
    model = vllm_config.model_config
    if config.fuse_norm and passes.norm is None and _norm_obstacle(vllm_config) is None:
        passes.norm = NormFusion(model.dtype)
        _warm_up_norm(model, config)
    if gate_up and passes.swiglu is None and _swiglu_obstacle(vllm_config) is None:
        passes.swiglu = SwigluFusion(model.dtype, [])
    if gate_up and passes.swiglu:
        passes.swiglu.gate_ups.append(gate_up)


def _passes(vllm_config: Any, config: Any) -> Passes | None:
    """The model's passes, which this installs; None where no pass can run."""
    installed = vllm_config.compilation_config.inductor_compile_config
    if _obstacle(vllm_config) is not None:
        return None
    return installed.setdefault(current_platform.pass_key, Passes(config.options()))


def _obstacle(config: Any) -> str | None:
    """Why no pass can run over the model, if so."""
    if config.compilation_config.mode == CompilationMode.NONE:
        return "the model is not compiled"
    taken = config.compilation_config.inductor_compile_config.get(current_platform.pass_key)
    if taken is not None and not isinstance(taken, Passes):
        return f"{current_platform.pass_key} is taken by {taken!r}"
    return None


def _swiglu_obstacle(config: Any) -> str | None:
    return _obstacle(config) or (None if config.lora_config is None else "LoRA adds to its inputs")


def _norm_obstacle(config: Any) -> str | None:
    first = compat.preferred_norm(config)
    return _obstacle(config) or (None if first == "native" else f"ir_op_priority names {first} first")


def not_fused(config: Any, fuse_swiglu: bool, fuse_norm: bool) -> dict[str, str | None]:
    """Why SwiGLU and norms of the model are not fused; None where the compiler may fuse them."""
    off = "switched off"
    return {
        "SwiGLU": _swiglu_obstacle(config) if fuse_swiglu else off,
        "norms": _norm_obstacle(config) if fuse_norm else off,
    }


def _warm_up_norm(model: Any, config: Any) -> None:
    if current_platform.is_cuda():
        device, size = torch.device("cuda", torch.cuda.current_device()), model.get_hidden_size()
        block = rotation_block(size, config.rotation_block)
        rounding = [("add_rms_norm_int8", block, size)] if config.activations else []
        ready((("add_rms_norm", size, size), *rounding), model.dtype, device, 1)
