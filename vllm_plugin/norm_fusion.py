"""The sum into the residual stream and the norm behind it as one kernel, `rowint8::add_rms_norm`.

vLLM writes the two as one operator of its own, `fused_add_rms_norm`, with implementations from several providers and,
for each model, an order of preference (`kernel_config.ir_op_priority`). This is one more provider. Unless `fuse_norm`
is false, `model` puts it before vLLM's native code: what torch.compile makes of that starts only when the kernel ahead
of it has ended. A provider that the user puts first stays first. The sum is rounded before it is normalized, as by
vLLM's CUDA kernel, not by its native code.
"""

from torch import Tensor
from vllm import ir

from rowint8.kernels import ops

PROVIDER = "rowint8"


def register_provider() -> None:
    """Makes the implementation known to vLLM, once in a process."""
    operator = ir.ops.fused_add_rms_norm
    if PROVIDER not in operator.impls:
        operator.register_impl(PROVIDER, supports_args=_supports)(_fused_add_rms_norm)


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
