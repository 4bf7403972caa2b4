"""The linear layers of a vLLM model, multiplied by the operator `rowint8::linear`.

In memory and in a pre-quantized checkpoint a layer is

    <layer>.weight        int8 [N, K]
    <layer>.weight_scale  fp16 [N]

which is `Int8Weight` as it is: no reshaping at load, and the tensors can be merged (q, k and v; gate and up) or split
by rows like any vLLM parameter. With INT8 activations the rows are rotated (`kernels.activations`), and in memory
`rotation_block` int32 [1] says by what, so that a saved state of the other kind lacks it or has it in excess.

Both kinds of checkpoint load through vLLM's layerwise processing: parameters start on the meta device, and a layer gets
memory when the last of its tensors has been read. So the peak is the INT8 model so far and one layer in full.
What `save_sharded_state` wrote is copied straight into the parameters that it was taken from.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, MergedColumnParallelLinear
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import replace_parameter

from rowint8.kernels import ops
from rowint8.kernels.activations import rotation_block
from rowint8.kernels.quantize import Int8Weight, check_stored, quantize_rowwise, row_absmax
from rowint8.vllm_plugin import attached
from rowint8.vllm_plugin.loading import FLOATS, Int8Method, guarded_loader, refuse_incomplete
from rowint8.vllm_plugin.passes import prepare_model
from rowint8.vllm_plugin.warmup import warm_up

logger = init_logger(f"vllm.{__name__}")

_HINT_ONLINE = 'an INT8 checkpoint needs "quantization_config": {"quant_method": "rowint8"} in its config.json'
_HINT_SCALE = "quantize the checkpoint again to get the scales of this format"
_HINT_BIAS = "biases are never quantized"
_HINT_SERIALIZED = 'to quantize while loading, set "serialized": false in quantization_config'


class RowInt8LinearMethod(LinearMethodBase, Int8Method):
    """Weights of one linear layer: quantized while loading, or read as INT8 where `serialized`.

    vLLM makes one instance per layer, and says in `create_weights` what it is a layer of.

    Args:
        prefix: the layer's name, for messages.
        config: the `RowInt8Config`, what the user chose.
    """

    uses_meta_device = True
    multiplies = True
    """Whether `apply` is ever called."""

    def __init__(self, prefix: str, config: Any) -> None:
        self.note_options(prefix, config)
        self.config = config
        self.block: int | None = None
        """Columns that are rotated together, where activations are INT8; 1 is no rotation."""
        self.k_is_split = False
        self.is_gate_up = False

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
        self.is_gate_up = self.config.fuse_swiglu and _is_gate_up(layer, output_partition_sizes)
        self.block = self._rotation_block(input_size, input_size_per_partition)
        shape = sum(output_partition_sizes), input_size_per_partition
        prepare_model(get_current_vllm_config(), self.config, shape if self.is_gate_up else None)
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
        if self.block and self.from_memory:
            layer.register_parameter("rotation_block", saved_blocks(self.block))
        attached.set_bias_loader(layer, load(f"{self.prefix}.bias", FLOATS, _HINT_BIAS))
        if not self.from_memory:
            initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leaves `weight` int8 [N, K] and `weight_scale` fp16 [N] as plain parameters. vLLM calls it twice a load.

        Raises:
            ValueError: the checkpoint lacks a part of the layer, or holds NaN, Inf or a scale that no row has.
        """
        if attached.is_processed(layer):
            return
        if not self.dummy and not self.from_memory:
            refuse_incomplete(layer, self.prefix)
        values, scale = self._read(layer) if self.serialized else self._quantize(layer.weight.data)
        replace_parameter(layer, "weight", values)
        replace_parameter(layer, "weight_scale", scale)
        if self.block:
            note_rotation(layer, self.prefix, saved_blocks(self.block), self.from_memory)
        attached.set_processed(layer)
        if self.multiplies:
            warm_up(self, layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        if self.block is None:
            return ops.linear(x, layer.weight, layer.weight_scale, bias)
        tokens, scale = ops.quantize_tokens(x, self.block)
        return ops.linear_int8(tokens, scale, layer.weight, layer.weight_scale, bias, x.dtype)

    def _rotation_block(self, k: int, k_of_rank: int) -> int | None:
        """The block for INT8 activations; None where only weights are INT8."""
        return None if self.config.activations is None else block_of_rank(self.prefix, self.config, k, k_of_rank)

    def _read(self, layer: Any) -> Int8Weight:
        stored = Int8Weight(layer.weight.data, layer.weight_scale.data)
        if not self.dummy:
            check_stored(stored, f"{self.prefix}.weight")
        return stored

    def _quantize(self, weight: Tensor) -> Int8Weight:
        group = get_tp_group() if self.k_is_split else None
        return quantize_part(weight, f"{self.prefix}.weight", group, self.block or 1)


def quantize_part(weight: Tensor, name: str, group: Any = None, block: int = 1) -> Int8Weight:
    """Rounds a [N, K] weight; where it is a rank's part of the columns, with the scales of the whole rows.

    Args:
        name: of the weight, for messages.
        group: vLLM's group of the ranks that hold the other columns, or None.
        block: columns that are rotated together first.
    """
    absmax = None
    if group is not None:
        absmax = row_absmax(weight, name=name, block=block)
        torch.distributed.all_reduce(absmax, torch.distributed.ReduceOp.MAX, group=group.device_group)
    return quantize_rowwise(weight, name=name, block=block, absmax=absmax)


def block_of_rank(prefix: str, config: Any, k: int, k_of_rank: int) -> int:
    """Columns that are rotated together in a layer of K inputs, of which a rank may hold a part.

    Raises:
        ValueError: the part is not whole blocks.
    """
    block = rotation_block(k, config.rotation_block)
    if k_of_rank % block:
        raise ValueError(
            f"{prefix}: a rank holds {k_of_rank} of {k} columns, not whole rotated blocks of {block}; "
            f'take fewer ranks, or "rotation_block": {rotation_block(k_of_rank, block)}'
        )
    if block == 1:
        logger.warning_once(f"rowint8: layers of {k} inputs are not rotated: no power of two from 16 on divides {k}")
    return block


def note_rotation(layer: Any, prefix: str, blocks: Tensor, from_memory: bool) -> None:
    """Leaves `rotation_block`, or refuses one of a saved state that differs."""
    saved = getattr(layer, "rotation_block", None)
    if from_memory and saved is not None and not torch.equal(saved.cpu(), blocks):
        theirs, ours = saved[0].tolist(), blocks[0].tolist()
        raise ValueError(f"{prefix}: rows are rotated by {theirs}, not by {ours} as the options say")
    replace_parameter(layer, "rotation_block", blocks.to(next(layer.parameters(recurse=False)).device))


def saved_blocks(*blocks: Any) -> nn.Parameter:
    """What a saved state holds of them."""
    return nn.Parameter(torch.tensor(blocks, dtype=torch.int32), requires_grad=False)


def _is_gate_up(layer: Any, output_partition_sizes: list[int]) -> bool:
    """Whether two layers of one size were merged, as gate and up are."""
    return (
        isinstance(layer, MergedColumnParallelLinear)
        and len(output_partition_sizes) == 2
        and output_partition_sizes[0] == output_partition_sizes[1]
    )
