"""The linear layers of a vLLM model, multiplied by the operator `rowint8::linear`.

In memory and in a pre-quantized checkpoint a layer is

    <layer>.weight        int8 [N, K]
    <layer>.weight_scale  fp16 [N]

which is `Int8Weight` as it is: no reshaping at load, and the tensors can be merged (q, k and v; gate and up) or split
by rows like any vLLM parameter.

Both kinds of checkpoint load through vLLM's layerwise processing: parameters start on the meta device, and a layer gets
memory when the last of its tensors has been read. So the peak is the INT8 model so far and one layer in full.
What `save_sharded_state` wrote is copied straight into the parameters that it was taken from.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import LinearMethodBase, MergedColumnParallelLinear
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import replace_parameter

from rowint8.kernels import ops
from rowint8.kernels.quantize import Int8Weight, quantize_rowwise
from rowint8.vllm_plugin import attached
from rowint8.vllm_plugin.loading import FLOATS, SAVED_FROM_MEMORY, Int8Method, guarded_loader, refuse_incomplete
from rowint8.vllm_plugin.passes import prepare_model
from rowint8.vllm_plugin.warmup import warm_up

_HINT_ONLINE = 'an INT8 checkpoint needs "quantization_config": {"quant_method": "rowint8"} in its config.json'
_HINT_SCALE = "quantize the checkpoint again to get the scales of this format"
_HINT_BIAS = "biases are never quantized"
_HINT_SERIALIZED = 'to quantize while loading, set "serialized": false in quantization_config'


class RowInt8LinearMethod(LinearMethodBase, Int8Method):
    """Weights of one linear layer: quantized while loading, or read as INT8 where `serialized`.

    vLLM makes one instance per layer, and says in `create_weights` what it is a layer of.

    Args:
        prefix: the layer's name, for messages.
        serialized: whether the checkpoint holds INT8 weights.
        fuse_swiglu: whether the pass of `swiglu_fusion` may take a gate_up layer together with what follows it.
        fuse_norm: whether the model of this layer may compute its norms by `rowint8::add_rms_norm`.
    """

    uses_meta_device = True
    multiplies = True
    """Whether `apply` is ever called."""

    def __init__(self, prefix: str, serialized: bool, fuse_swiglu: bool = False, fuse_norm: bool = False) -> None:
        self.prefix = prefix
        self.fuse_swiglu = fuse_swiglu
        self.fuse_norm = fuse_norm
        self.k_is_split = False
        self.is_gate_up = False
        self.dtype = torch.get_default_dtype()
        config = get_current_vllm_config()
        self.max_tokens = config.scheduler_config.max_num_batched_tokens
        load_format = config.load_config.load_format
        self.dummy = load_format == "dummy"
        self.from_memory = load_format in SAVED_FROM_MEMORY
        self.serialized = serialized or self.from_memory

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers `weight` [N, K], and `weight_scale` [N] where serialized, on the meta device (see the module)."""
        self.k_is_split = input_size_per_partition != input_size
        self.dtype = params_dtype
        self.is_gate_up = self.fuse_swiglu and _is_gate_up(layer, output_partition_sizes)
        shape = sum(output_partition_sizes), input_size_per_partition
        prepare_model(get_current_vllm_config(), self.fuse_norm, shape if self.is_gate_up else None)
        device = None if self.from_memory else "meta"
        dtype = torch.int8 if self.serialized else params_dtype
        dtypes, hint = ((torch.int8,), _HINT_SERIALIZED) if self.serialized else (FLOATS, _HINT_ONLINE)
        load = partial(guarded_loader, extra_weight_attrs["weight_loader"], layer)
        weight = ModelWeightParameter(
            data=torch.empty(shape, dtype=dtype, device=device),
            input_dim=1,
            output_dim=0,
            weight_loader=load(f"{self.prefix}.weight", dtypes, hint),
        )
        layer.register_parameter("weight", weight)
        if self.serialized:
            scale = ChannelQuantScaleParameter(
                data=torch.empty(shape[0], dtype=torch.float16, device=device),
                output_dim=0,
                weight_loader=load(f"{self.prefix}.weight_scale", (torch.float16,), _HINT_SCALE),
            )
            layer.register_parameter("weight_scale", scale)
        attached.set_bias_loader(layer, load(f"{self.prefix}.bias", FLOATS, _HINT_BIAS))
        if not self.from_memory:
            initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leaves `weight` int8 [N, K] and `weight_scale` fp16 [N] as plain parameters. vLLM calls it twice a load.

        Raises:
            ValueError: the checkpoint lacks a part of the layer, or holds NaN, Inf or a negative scale.
        """
        if attached.is_processed(layer):
            return
        if not self.dummy and not self.from_memory:
            refuse_incomplete(layer, self.prefix)
        values, scale = self._read(layer) if self.serialized else self._quantize(layer.weight.data)
        replace_parameter(layer, "weight", values)
        replace_parameter(layer, "weight_scale", scale)
        attached.set_processed(layer)
        if self.multiplies:
            warm_up(self, layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        return ops.linear(x, layer.weight, layer.weight_scale, bias)

    def _read(self, layer: Any) -> Int8Weight:
        scale = layer.weight_scale.data
        bad = ~(torch.isfinite(scale) & (scale >= 0))
        if bad.any() and not self.dummy:
            row = int(bad.nonzero()[0])
            raise ValueError(f"{self.prefix}.weight_scale: row {row} is {float(scale[row])}, not a finite scale >= 0")
        return Int8Weight(layer.weight.data, scale)

    def _quantize(self, weight: Tensor) -> Int8Weight:
        return quantize_part(weight, f"{self.prefix}.weight", get_tp_group() if self.k_is_split else None)


def quantize_part(weight: Tensor, name: str, group: Any = None) -> Int8Weight:
    """Rounds a [N, K] weight; where it is a rank's part of the columns, with the scales of the whole rows.

    Args:
        name: of the weight, for messages.
        group: vLLM's group of the ranks that hold the other columns, or None.
    """
    if group is None:
        return quantize_rowwise(weight, name=name)
    absmax = _absmax_over_ranks(weight, group)[:, None]
    values, scale = quantize_rowwise(torch.cat([weight, absmax], dim=1), name=name)
    return Int8Weight(values[:, :-1].contiguous(), scale)


def _is_gate_up(layer: Any, output_partition_sizes: list[int]) -> bool:
    """Whether two layers of one size were merged, as gate and up are."""
    return (
        isinstance(layer, MergedColumnParallelLinear)
        and len(output_partition_sizes) == 2
        and output_partition_sizes[0] == output_partition_sizes[1]
    )


def _absmax_over_ranks(weight: Tensor, group: Any) -> Tensor:
    """Largest magnitude of each whole row [N], in the weight's dtype, of a weight split along K over the group."""
    absmax = torch.linalg.vector_norm(weight, ord=float("inf"), dim=1).float()
    torch.distributed.all_reduce(absmax, torch.distributed.ReduceOp.MAX, group=group.device_group)
    return absmax.to(weight.dtype)
