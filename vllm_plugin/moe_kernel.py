"""`rowint8::experts` and `rowint8::experts_int8` as vLLM's modular kernels call them, with vLLM's own Triton kernel for
what the first does not do.

The class only computes this rank's experts. Tensor and expert parallelism, the map from all experts to those that are
here, and EPLB's moves of experts stay vLLM's.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

logger = init_logger(f"vllm.{__name__}")

ACTIVATIONS = {MoEActivation.SILU: "silu", MoEActivation.SWIGLUOAI: "swigluoai"}
"""vLLM's activation to that of `ops.experts`, which has the same order of rows."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowInt8Experts(TritonExperts):
    """The experts of one layer: INT8 weights, 16-bit or fp32 activations."""

    blocks: tuple[int, int] | None = None
    """Columns of gate_up and of down that are rotated together, where activations are rounded to INT8."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes [M, H] to `output`, which may lie in `workspace13`."""
        from rowint8.kernels.experts.hopper import Rotation
        from rowint8.kernels.experts.launch import experts

        reason = self._why_not(hidden_states, activation, apply_router_weight_on_input)
        if reason and self.blocks:
            raise ValueError(f"rowint8: these experts take INT8 activations alone, and {reason}")
        if reason:
            _say(reason)
            more = a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input
            routing = topk_weights, topk_ids, activation, global_num_experts, expert_map
            return super().apply(output, hidden_states, w1, w2, *routing, *more)
        experts(
            hidden_states,
            *(w1, self.w1_scale, w2, self.w2_scale, topk_weights.contiguous(), topk_ids.contiguous()),
            *(
                self.w1_bias,
                self.w2_bias,
                expert_map,
                *activation_arguments(activation, self.quant_config, self.moe_config),
            ),
            rotation=Rotation(*self.blocks) if self.blocks else None,
            out=output,
            scratch=(workspace13, workspace2),
        )

    def _why_not(self, x: Tensor, activation: MoEActivation, weighted_inputs: bool) -> str | None:
        """What about this call `ops.experts` does not do, if anything."""
        if self._lora_context is not None:
            return "experts have LoRA adapters"
        if x.dtype not in _DTYPES or not x.is_contiguous():
            return f"activations are {x.dtype}, or not contiguous"
        if activation not in ACTIVATIONS:
            return f"their activation is {activation.value}"
        return "their inputs are weighted, not their outputs" if weighted_inputs else None


def experts_class(blocks: tuple[int, int] | None) -> type[RowInt8Experts]:
    """The class for experts whose rows are rotated by these blocks, or not at all; vLLM makes its object."""
    return type("RowInt8Experts", (RowInt8Experts,), {"blocks": blocks}) if blocks else RowInt8Experts


def activation_arguments(
    activation: MoEActivation, quant_config: Any, moe_config: Any
) -> tuple[str, float, float | None]:
    """activation, alpha and limit as `ops.experts` takes them; gpt-oss's own where the model does not say."""
    alpha, limit = quant_config.gemm1_alpha, quant_config.gemm1_clamp_limit
    if limit is None:
        limit = getattr(moe_config, "swiglu_limit", None)
    if activation == MoEActivation.SWIGLUOAI:
        return ACTIVATIONS[activation], alpha or 1.702, 7.0 if limit is None else limit
    return ACTIVATIONS[activation], 1.0, limit


@cache
def _say(reason: str) -> None:
    logger.warning("rowint8: vLLM's Triton kernel computes the INT8 experts: %s", reason)
