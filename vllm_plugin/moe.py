"""The experts of a mixture-of-experts layer: each a gate_up and a down projection in INT8, quantized while they load or
read as INT8.

In memory a layer of E experts, hidden size H and intermediate size I (a rank's part of them) is

    w13_weight  int8 [E, 2I, H]    w13_weight_scale  fp16 [E, 2I]    gate rows over up rows
    w2_weight   int8 [E, H, I]     w2_weight_scale   fp16 [E, H]

With INT8 activations the rows are rotated, and `rotation_block` int32 [E, 2] says by what: the blocks of w13's and of
w2's columns, the same for each expert, as EPLB moves whatever a layer holds with its experts.

A checkpoint holds each expert's layers on their own, as `rowint8 quantize` writes them: int8 `weight` [N, K] and fp16
`weight_scale` [N].

On GPUs they run in `rowint8::experts` or `rowint8::experts_int8` (`moe_kernel`), on CPUs in the same operators, called
directly: vLLM's CPU kernels for INT8 experts round activations in a way of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_ep_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import int8_w8a16_moe_quant_config
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend, make_int8_moe_kernel
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform

from rowint8.kernels import ops
from rowint8.kernels.experts.tiles import why_not_int8
from rowint8.kernels.quantize import Int8Weight, check_stored
from rowint8.vllm_plugin import attached, compat
from rowint8.vllm_plugin.linear import block_of_rank, note_rotation, quantize_part, saved_blocks
from rowint8.vllm_plugin.loading import FLOATS, Int8Method, guarded_loader, refuse_incomplete
from rowint8.vllm_plugin.moe_kernel import activation_arguments, experts_class
from rowint8.vllm_plugin.warmup import warm_up_experts

logger = init_logger(f"vllm.{__name__}")

_HINT = 'an INT8 checkpoint needs "quantization_config": {"quant_method": "rowint8"} in its config.json'
_HINT_SERIALIZED = "quantize the checkpoint again, which writes INT8 experts, or name them in its ignore list"


def make_experts_method(layer: Any, prefix: str, config: Any) -> "RowInt8MoEMethod":
    """The method for a `RoutedExperts` layer on this machine; `config` is the `RowInt8Config`."""
    method = RowInt8CpuMoEMethod if current_platform.is_cpu() else RowInt8MoEMethod
    return method(layer.moe_config, prefix, config)


def why_unquantized(layer: Any) -> str | None:
    """What about these experts is not done in INT8, if anything."""
    if compat.refuses_quantized_experts(layer):
        return f"{type(layer).__name__} takes no quantized ones"
    if layer.activation != MoEActivation.SILU or layer.swiglu_limit is not None:
        return f"their activation is {layer.activation.value}, not a plain SwiGLU"
    if layer.moe_config.has_bias:
        return "they have biases"
    if layer.apply_router_weight_on_input:
        return "their inputs are weighted, not their outputs"
    return None


class RowInt8MoEMethod(OnlineMoEMethodBase, Int8Method):
    """The experts of one layer, on a GPU. vLLM makes one instance per layer; `prefix` is its name, for messages."""

    def __init__(self, moe: Any, prefix: str, config: Any) -> None:
        super().__init__(moe)
        vllm_config = self.note_options(prefix, config)
        self.blocks = _rotation(moe, prefix, config, vllm_config.lora_config is not None)
        """Columns of w13 and of w2 that are rotated together, where activations are INT8."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the weights on the meta device: in the model's dtype, or all four parameters where `serialized`.
        Those of a saved state have memory, and no loader."""
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        self.dtype = params_dtype
        if self.from_memory:
            if self.blocks:
                layer.register_parameter("rotation_block", saved_blocks(*[self.blocks] * num_experts))
            return _register_int8(layer, *sizes, None)
        load = extra_weight_attrs["weight_loader"]
        if not self.serialized:
            guarded = guarded_loader(load, layer, self.prefix, FLOATS, _HINT)
            attributes = extra_weight_attrs | {"weight_loader": guarded}
            return super().create_weights(layer, *sizes, params_dtype, **attributes)
        _register_int8(layer, *sizes, "meta")
        for name, param in list(layer.named_parameters(recurse=False)):
            is_scale = name.endswith("_scale")
            dtypes = (torch.float16,) if is_scale else (torch.int8,)
            loader = _scale_loader(layer) if is_scale else load
            guarded = guarded_loader(loader, layer, f"{self.prefix}.{name}", dtypes, _HINT_SERIALIZED)
            set_weight_attrs(param, extra_weight_attrs | {"weight_loader": guarded})
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leaves the four parameters of the module's docstring. vLLM calls it twice a load.

        Raises:
            ValueError: the checkpoint lacks a part of an expert, or holds NaN, Inf or a scale that no row has.
        """
        if attached.is_processed(layer):
            return
        if not self.dummy and not self.from_memory:
            refuse_incomplete(layer, self.prefix)
        for name in ("w13_weight", "w2_weight"):
            self._keep(layer, name) if self.serialized else self._quantize(layer, name)
        if self.blocks:
            note_rotation(layer, self.prefix, saved_blocks(*[self.blocks] * len(layer.w2_weight)), self.from_memory)
        if self.moe_kernel is None:  # a reload writes into the tensors that the kernel already has
            self._make_kernel(layer)
        attached.set_processed(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return int8_w8a16_moe_quant_config(w1_scale=layer.w13_weight_scale, w2_scale=layer.w2_weight_scale)

    def _quantize(self, layer: Any, name: str) -> None:
        group = get_ep_group() if name == "w2_weight" and self.moe.tp_size > 1 else None
        weight = getattr(layer, name).data  # [E, N, K]
        block = self.blocks[name == "w2_weight"] if self.blocks else 1
        values, scale = quantize_part(weight.flatten(0, 1), f"{self.prefix}.{name}", group, block)
        replace_parameter(layer, name, values.view(weight.shape))
        replace_parameter(layer, f"{name}_scale", scale.view(weight.shape[:2]))

    def _keep(self, layer: Any, name: str) -> None:
        values, scale = (getattr(layer, each).data.flatten(0, 1) for each in (name, f"{name}_scale"))
        if not self.dummy:
            check_stored(Int8Weight(values, scale), f"{self.prefix}.{name}")
        for each in (name, f"{name}_scale"):
            replace_parameter(layer, each, getattr(layer, each).data)

    def _make_kernel(self, layer: Any) -> None:
        config = self.get_fused_moe_quant_config(layer)
        self.moe_quant_config = config
        self.moe_kernel = make_int8_moe_kernel(
            int8_backend=Int8MoeBackend.TRITON,
            moe_quant_config=config,
            moe_config=self.moe,
            experts_cls=experts_class(self.blocks),
            routing_tables=layer._expert_routing_tables(),
        )
        warm_up_experts(self, layer, activation_arguments(layer.activation, config, self.moe))


def _rotation(moe: Any, prefix: str, config: Any, has_lora: bool) -> tuple[int, int] | None:
    """Blocks of w13 and of w2 for INT8 activations; None where the experts' tokens stay as they are, which is logged.

    Raises:
        ValueError: a rank's columns are not whole blocks, or the checkpoint's rows are rotated for nothing.
    """
    if not config.activations:
        return None
    hidden, part = moe.hidden_dim, moe.intermediate_size_per_partition
    device = torch.device(current_platform.device_type)
    reason = "they may get LoRA adapters" if has_lora else why_not_int8(moe.in_dtype, hidden, part, device)
    if reason and config.serialized:
        raise ValueError(f"{prefix}: the checkpoint's experts are for INT8 activations, and {reason}")
    if reason:
        logger.warning_once(f"rowint8: activations of experts are not rounded to INT8: {reason}")
        return None
    return block_of_rank(prefix, config, hidden, hidden), block_of_rank(prefix, config, part * moe.tp_size, part)


def _register_int8(layer: Any, experts: int, hidden: int, intermediate: int, device: str | None) -> None:
    for name, rows, columns in (("w13_weight", 2 * intermediate, hidden), ("w2_weight", hidden, intermediate)):
        values = torch.empty(experts, rows, columns, dtype=torch.int8, device=device)
        layer.register_parameter(name, nn.Parameter(values, requires_grad=False))
        scale = torch.empty(experts, rows, dtype=torch.float16, device=device)
        layer.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))


def _scale_loader(layer: Any) -> Callable:
    """Loads the scales of one expert's layer, [N] in the checkpoint; vLLM's own has other shapes.

    Gate (w1) and up (w3) are split by rows over the ranks, as their weights are; down (w2) by columns.
    """

    def load(
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if expert != -1:
            rows = param.data[expert]
            if shard_id != "w2":
                half, rank = len(rows) // 2, layer.moe_config.tp_rank
                rows = rows[:half] if shard_id == "w1" else rows[half:]
                loaded_weight = loaded_weight[half * rank : half * (rank + 1)]
            rows.copy_(loaded_weight)
        return expert != -1 if return_success else None

    return load


class RowInt8CpuMoEMethod(RowInt8MoEMethod):
    """The experts of one layer, on a CPU."""

    @property
    def is_monolithic(self) -> bool:
        return compat.select_experts is not None

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared_experts: Any) -> Tensor:
        """[M, H] -> [M, H] in x's dtype, for the experts that this rank holds."""
        weights = (layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale)
        if self.blocks:
            return ops.experts_int8(x, *weights, topk_weights, topk_ids, layer.expert_map, *self.blocks)
        return ops.experts(x, *weights, topk_weights, topk_ids, expert_map=layer.expert_map)

    def apply_monolithic(self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None) -> Tensor:
        assert compat.select_experts is not None
        topk_weights, topk_ids = compat.select_experts(
            hidden_states=x,
            router_logits=router_logits,
            top_k=layer.top_k,
            use_grouped_topk=layer.use_grouped_topk,
            renormalize=layer.renormalize,
            topk_group=layer.topk_group,
            num_expert_group=layer.num_expert_group,
            custom_routing_function=layer.custom_routing_function,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
            e_score_correction_bias=layer.e_score_correction_bias,
        )
        return self.apply(layer, x, topk_weights, topk_ids)

    def _make_kernel(self, layer: Any) -> None:
        """There is none: `apply` runs the operator."""
