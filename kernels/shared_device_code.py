"""Device code that kernels in Triton and in Gluon share."""

from typing import Any

import triton
import triton.language as tl
from triton import knobs

PREFETCH: Any = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
"""PTX: asks L2 for the 128 bytes around an address."""


_SILU_TIMES: Any = tl.constexpr(
    """{
        .reg .f32 e;
        mul.rn.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.rn.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        mul.rn.f32 e, e, $1;
        mul.rn.f32 $0, e, $2;
    }"""
)
"""gate / (1 + 2^(-gate log2 e)) * up, with approximations of 2 ulp. The compiler's own exponential and division mind
subnormal numbers, which takes three times as many instructions and changes nothing here."""
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in fp32, the activation of SwiGLU."""
    if _INTERPRETED:
        out = gate / (1.0 + tl.exp(-gate)) * up
    else:
        out = tl.inline_asm_elementwise(_SILU_TIMES, "=f,f,f", [gate, up], dtype=tl.float32, is_pure=True, pack=1)
    return out


@triton.jit
def weight_rows(pid, N, BLOCK_N: tl.constexpr, FUSED: tl.constexpr):
    """Rows [BN] of the weight that a program multiplies, clamped in range: N outputs have N rows, or 2N for SwiGLU."""
    if FUSED:
        n = tl.arange(0, BLOCK_N)
        rows = tl.minimum(pid * (BLOCK_N // 2) + n // 2, N - 1) + (n % 2) * N
    else:
        rows = tl.minimum(pid * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    return rows.to(tl.int64)
