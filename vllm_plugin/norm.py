"""The sum into the residual stream and the norm behind it as one kernel, `rowint8::add_rms_norm`.

vLLM writes the two as one operator of its own, `fused_add_rms_norm`, with implementations from several providers and,
for each model, an order of preference (`kernel_config.ir_op_priority`). This is one more provider. A model prefers it
to vLLM's native code, unless `fuse_norm` is false: what torch.compile makes of that starts only when the kernel ahead
of it has ended. A provider that the user puts first stays first. The sum is rounded before it is normalized, as by
vLLM's CUDA kernel, not by its native code.
"""

import torch
from torch import Tensor
from vllm import ir
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from rowint8.kernels import ops
from rowint8.vllm_plugin.warmup import ready

logger = init_logger(f"vllm.{__name__}")

PROVIDER = "rowint8"


def register_provider() -> None:
    """Makes the implementation known to vLLM, once in a process."""
    operator = ir.ops.fused_add_rms_norm
    if PROVIDER not in operator.impls:
        operator.register_impl(PROVIDER, supports_args=_supports)(_fused_add_rms_norm)


def prefer_provider() -> None:
    """Puts this implementation before vLLM's native one in the model being built, and makes its kernel ready."""
    config = get_current_vllm_config()
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


def _supports(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    if weight is None or variance_size is not None or x.dtype not in ops.ACTIVATION_DTYPES:
        return False
    alike = x.dtype == x_residual.dtype == weight.dtype and x.shape == x_residual.shape
    return alike and weight.shape == x.shape[-1:]


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    assert weight is not None
    return ops.add_rms_norm(x, x_residual, weight, epsilon)
