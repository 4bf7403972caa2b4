"""Device code that kernels in Triton and in Gluon share."""

from typing import Any

import triton
import triton.language as tl

PREFETCH: Any = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
"""PTX: asks L2 for the 128 bytes around an address."""


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up, the activation of SwiGLU."""
    return gate / (1.0 + tl.exp(-gate)) * up
