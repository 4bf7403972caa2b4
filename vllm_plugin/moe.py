"""The experts of a mixture-of-experts layer: each a gate_up and a down projection in INT8, quantized while they load.

In memory a layer of E experts, hidden size H and intermediate size I (a rank's part of them) is

    w13_weight  int8 [E, 2I, H]    w13_weight_scale  fp16 [E, 2I]    gate rows over up rows
    w2_weight   int8 [E, H, I]     w2_weight_scale   fp16 [E, H]

On GPUs they run in vLLM's own fused-MoE Triton kernel: it widens INT8 to the activations' dtype, accumulates in fp32
and multiplies by the scales last, as `rowint8::linear` does. vLLM's CPU kernels for INT8 experts round the activations
too, so on CPUs the experts run one after another through rowint8's operators.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_ep_group
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import int8_w8a16_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend, make_int8_moe_kernel
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from rowint8.kernels import ops
from rowint8.vllm_plugin import attached, compat
from rowint8.vllm_plugin.linear import quantize_part
from rowint8.vllm_plugin.loading import FLOATS, SAVED_FROM_MEMORY, Int8Method, guarded_loader, refuse_incomplete

_HINT = "INT8 experts cannot be read from a checkpoint, only quantized while they load"


def make_experts_method(layer: Any, prefix: str) -> "RowInt8MoEMethod":
    """The method for a `RoutedExperts` layer on this machine."""
    method = RowInt8CpuMoEMethod if current_platform.is_cpu() else RowInt8MoEMethod
    return method(layer.moe_config, prefix)


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

    def __init__(self, moe: Any, prefix: str) -> None:
        super().__init__(moe)
        self.prefix = prefix
        load_format = get_current_vllm_config().load_config.load_format
        self.dummy = load_format == "dummy"
        self.from_memory = load_format in SAVED_FROM_MEMORY

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the weights in the model's dtype on the meta device, or all four parameters if `from_memory`."""
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        if self.from_memory:
            return _register_int8(layer, *sizes)
        load = guarded_loader(extra_weight_attrs["weight_loader"], layer, self.prefix, FLOATS, _HINT)
        super().create_weights(layer, *sizes, params_dtype, **extra_weight_attrs | {"weight_loader": load})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leaves the four parameters of the module's docstring. vLLM calls it twice a load.

        Raises:
            ValueError: the checkpoint lacks a part of an expert, or holds NaN or Inf.
        """
        if attached.is_processed(layer):
            return
        if not self.dummy and not self.from_memory:
            refuse_incomplete(layer, self.prefix)
        if not self.from_memory:
            self._quantize(layer, "w13_weight", group=None)
            self._quantize(layer, "w2_weight", group=get_ep_group() if self.moe.tp_size > 1 else None)
        if self.moe_kernel is None:  # a reload writes into the tensors that the kernel already has
            self._make_kernel(layer)
        attached.set_processed(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return int8_w8a16_moe_quant_config(w1_scale=layer.w13_weight_scale, w2_scale=layer.w2_weight_scale)

    def _quantize(self, layer: Any, name: str, group: Any) -> None:
        weight = getattr(layer, name).data  # [E, N, K]
        values, scale = quantize_part(weight.flatten(0, 1), f"{self.prefix}.{name}", group)
        replace_parameter(layer, name, values.view(weight.shape))
        replace_parameter(layer, f"{name}_scale", scale.view(weight.shape[:2]))

    def _make_kernel(self, layer: Any) -> None:
        config = self.get_fused_moe_quant_config(layer)
        self.moe_quant_config = config
        self.moe_kernel = make_int8_moe_kernel(
            int8_backend=Int8MoeBackend.TRITON,
            moe_quant_config=config,
            moe_config=self.moe,
            experts_cls=TritonExperts,
            routing_tables=layer._expert_routing_tables(),
        )


def _register_int8(layer: Any, experts: int, hidden: int, intermediate: int) -> None:
    for name, rows, columns in (("w13_weight", 2 * intermediate, hidden), ("w2_weight", hidden, intermediate)):
        values = torch.empty(experts, rows, columns, dtype=torch.int8)
        layer.register_parameter(name, nn.Parameter(values, requires_grad=False))
        scale = torch.empty(experts, rows, dtype=torch.float16)
        layer.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))


class RowInt8CpuMoEMethod(RowInt8MoEMethod):
    """The experts of one layer, on a CPU."""

    @property
    def is_monolithic(self) -> bool:
        return compat.select_experts is not None

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared_experts: Any) -> Tensor:
        """[M, H] -> [M, H] in x's dtype, for the experts that this rank holds."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        weights = (layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale)
        return _experts_in_turn(x, *weights, topk_weights, topk_ids)

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
        """There is none: `apply` runs the operators."""


@torch.library.custom_op("rowint8::experts_in_turn", mutates_args=())
def _experts_in_turn(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """The weighted sum over each token's experts, in fp32 and rounded once. Negative ids are other ranks' experts.

    An operator, because which rows go to an expert depends on the data, which a compiled graph cannot express.
    """
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        hidden = ops.swiglu(x[token], w13[expert], w13_scale[expert])
        down = ops.linear(hidden, w2[expert], w2_scale[expert])
        out.index_add_(0, token, down * topk_weights[token, slot, None].float())
    return out.to(x.dtype)


@_experts_in_turn.register_fake
def _(x: Tensor, *weights_and_routing: Tensor) -> Tensor:
    return torch.empty_like(x)
