"""Guards around vLLM's weight loading.

vLLM casts, truncates or skips a tensor that does not fit a parameter, and a parameter of a quantized layer that no
tensor filled keeps whatever was in its memory. Each would make a model that runs and says nonsense, so they are errors
here.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import CopyCounter

from rowint8.vllm_plugin import attached

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of a checkpoint's weights that can be quantized."""

SAVED_FROM_MEMORY = ("sharded_state", "runai_streamer_sharded")
"""Load formats of files that `save_sharded_state` wrote: each rank's parameters as they were in memory, so INT8."""

_OF_ROUTER = "e_score_correction_bias"
"""A parameter that experts share with their router. `guard` sees that the checkpoint fills it."""

_HINT_AGAIN = "a checkpoint may hold it once, and other weights come in through `reload_weights`"


class Int8Method:
    """A layer's method of this plugin, which guards the layer itself."""

    owns_weights = True
    """Whether the checkpoint fills the layer, and no other one that it shares its weights with."""

    def note_options(self, prefix: str, config: Any) -> Any:
        """Keeps the layer's name, for messages, and what the options say of its weights. Returns vLLM's config.

        Args:
            config: the `RowInt8Config`.
        """
        vllm_config = get_current_vllm_config()
        load_format = vllm_config.load_config.load_format
        self.prefix = prefix
        self.dtype = torch.get_default_dtype()
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.dummy = load_format == "dummy"
        self.from_memory = load_format in SAVED_FROM_MEMORY
        self.serialized = config.serialized or self.from_memory
        return vllm_config


def guarded_loader(load: Callable, layer: nn.Module, name: str, dtypes: tuple[torch.dtype, ...], hint: str) -> Callable:
    """vLLM's weight loader `load`, refusing checkpoint tensors of another dtype or shape than parameter `name` needs.

    What it copied is remembered on the parameter, for `refuse_incomplete`.

    Args:
        load: (param, loaded_weight, what the tensor is a part of, or nothing).
        layer: the linear, vocabulary or experts layer that the parameter belongs to.
        name: of the parameter, for messages.
        dtypes: accepted in the checkpoint.
        hint: what to do about another dtype.

    Returns:
        A loader with the same signature, which vLLM inspects to pass all arguments by position. It raises ValueError.
    """

    @wraps(load)
    def guarded(param: Any, loaded_weight: Tensor, *shard: Any) -> Any:
        if attached.is_processed(layer) and not get_layerwise_info(layer).can_load():
            raise ValueError(f"{name}: it is quantized already, and a second tensor for it came; {_HINT_AGAIN}")
        if loaded_weight.dtype not in dtypes:
            accepted = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{name}: the checkpoint has {loaded_weight.dtype}, expected {accepted}; {hint}")
        shape = _checkpoint_shape(layer, param, *shard[:1])
        if shape is not None and list(loaded_weight.shape) != shape:
            part = f" (part {shard[0]})" if shard and shard[0] is not None else ""
            raise ValueError(f"{name}{part}: the checkpoint has shape {list(loaded_weight.shape)}, expected {shape}")
        try:
            with CopyCounter() as counter:
                answer = load(param, loaded_weight, *shard)
        except AssertionError as error:  # how vLLM says that the tensor does not fit, often without a word
            refusal = f"{name}: the checkpoint has shape {list(loaded_weight.shape)}, which does not fit"
            raise ValueError(f"{refusal}: {error}".removesuffix(": ")) from error
        if not param.is_meta:  # on the meta device vLLM only counts, and loads again later
            attached.note_part(param, shard, counter.copied_numel)
        return answer

    return guarded


def _checkpoint_shape(layer: Any, param: Tensor, shard: Any = None) -> list[int] | None:
    """Shape in the checkpoint of the part `shard` of a merged layer, or of the whole parameter without one.

    None for experts, and for linear layers under tensor parallelism, which vLLM splits by rules of each class.
    """
    if isinstance(layer, RoutedExperts):
        return None
    if isinstance(layer, VocabParallelEmbedding):
        return [layer.org_vocab_size, *param.shape[1:]]
    if layer.tp_size > 1:
        return None
    rows = param.shape[0]
    if isinstance(shard, str):
        if shard not in ("q", "k", "v"):
            return None
        rows = layer.output_sizes["qkv".index(shard)]
    elif isinstance(shard, int):
        rows = layer.output_sizes[shard]
    elif isinstance(shard, tuple):
        rows = sum(layer.output_sizes[part] for part in shard)
    return [rows, *param.shape[1:]]


def refuse_incomplete(layer: nn.Module, prefix: str) -> None:
    """ValueError unless the checkpoint filled every parameter of the layer, up to the padding of a vocabulary."""
    for name, param in layer.named_parameters(recurse=False):
        if name == _OF_ROUTER:
            continue
        parts, expected = attached.loaded_parts(param), attached.expected_numel(param)
        if sum(parts.values()) < expected:
            found = f"{len(parts)} parts" if len(parts) > 3 else ", ".join(map(_part_name, parts)) or "nothing"
            raise ValueError(
                f"{prefix}.{name}: the checkpoint fills {sum(parts.values())} of its {expected} numbers (found {found})"
            )


def _part_name(shard: tuple) -> str:
    return " ".join(str(part) for part in shard)
