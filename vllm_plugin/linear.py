"""The linear layers of a vLLM model, multiplied by the operator `rowint8::linear`.

In memory and in a pre-quantized checkpoint a layer is

    <layer>.weight        int8 [N, K]
    <layer>.weight_scale  fp16 [N]

which is `Int8Weight` as it is: no reshaping at load, and the tensors can be merged (q, k and v; gate and up) or split
by rows like any vLLM parameter.

Both kinds of checkpoint load through vLLM's layerwise processing: parameters start on the meta device, and a layer gets
memory when the last of its tensors has been read. So the peak is the INT8 model so far and one layer in full.
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
from rowint8.vllm_plugin.loading import guarded_loader, refuse_incomplete
from rowint8.vllm_plugin.swiglu_fusion import expect_gate_up

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HINT_ONLINE = 'an INT8 checkpoint needs "quantization_config": {"quant_method": "rowint8"} in its config.json'
_HINT_SCALE = "quantize the checkpoint again to get the scales of this format"
_HINT_BIAS = "biases are never quantized"
_HINT_SERIALIZED = 'to quantize while loading, set "serialized": false in quantization_config'


class RowInt8LinearMethod(LinearMethodBase):
    """Weights of one linear layer: quantized while loading, or read as INT8 where `serialized`.

    vLLM makes one instance per layer. `prefix` is the layer's name, for messages; `fuse_swiglu` whether the pass of
    `swiglu_fusion` may take a gate_up layer together with what follows it.
    """

    uses_meta_device = True

    def __init__(self, prefix: str, serialized: bool, fuse_swiglu: bool = False) -> None:
        self.prefix = prefix
        self.serialized = serialized
        self.fuse_swiglu = fuse_swiglu
        self.k_is_split = False
        self.dummy = get_current_vllm_config().load_config.load_format == "dummy"

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
        """Registers `weight` [N, K], and `weight_scale` [N] where serialized, on the meta device."""
        self.k_is_split = input_size_per_partition != input_size
        if self.fuse_swiglu and _is_gate_up(layer, output_partition_sizes):
            expect_gate_up()
        rows = sum(output_partition_sizes)
        dtypes, hint = ((torch.int8,), _HINT_SERIALIZED) if self.serialized else (_FLOATS, _HINT_ONLINE)
        load = partial(guarded_loader, extra_weight_attrs["weight_loader"], layer)
        weight = ModelWeightParameter(
            data=torch.empty(
                rows,
                input_size_per_partition,
                dtype=torch.int8 if self.serialized else params_dtype,
                device="meta",
            ),
            input_dim=1,
            output_dim=0,
            weight_loader=load(f"{self.prefix}.weight", dtypes, hint),
        )
        layer.register_parameter("weight", weight)
        if self.serialized:
            scale = ChannelQuantScaleParameter(
                data=torch.empty(rows, dtype=torch.float16, device="meta"),
                output_dim=0,
                weight_loader=load(f"{self.prefix}.weight_scale", (torch.float16,), _HINT_SCALE),
            )
            layer.register_parameter("weight_scale", scale)
        # vLLM gives this loader to the bias, which it registers next
        layer.weight_loader = load(f"{self.prefix}.bias", _FLOATS, _HINT_BIAS)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leaves `weight` int8 [N, K] and `weight_scale` fp16 [N] as plain parameters. vLLM calls it twice a load.

        Raises:
            ValueError: the checkpoint lacks a part of the layer, or holds NaN, Inf or a negative scale.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        if not self.dummy:
            refuse_incomplete(layer, self.prefix)
        values, scale = self._read(layer) if self.serialized else self._quantize(layer.weight.data)
        replace_parameter(layer, "weight", values)
        replace_parameter(layer, "weight_scale", scale)
        layer._already_called_process_weights_after_loading = True

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
        """Rounds a rank's [N, K] part of the weight with the scales of its whole rows."""
        name = f"{self.prefix}.weight"
        if not self.k_is_split:
            return quantize_rowwise(weight, name=name)
        absmax = _absmax_over_ranks(weight)[:, None]
        values, scale = quantize_rowwise(torch.cat([weight, absmax], dim=1), name=name)
        return Int8Weight(values[:, :-1].contiguous(), scale)


def _is_gate_up(layer: Any, output_partition_sizes: list[int]) -> bool:
    """Whether two layers of one size were merged, as gate and up are."""
    return (
        isinstance(layer, MergedColumnParallelLinear)
        and len(output_partition_sizes) == 2
        and output_partition_sizes[0] == output_partition_sizes[1]
    )


def _absmax_over_ranks(weight: Tensor) -> Tensor:
    """Largest magnitude of each whole row [N], in the weight's dtype, of a weight split along K over the TP group."""
    absmax = torch.linalg.vector_norm(weight, ord=float("inf"), dim=1).float()
    torch.distributed.all_reduce(absmax, torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    return absmax.to(weight.dtype)
