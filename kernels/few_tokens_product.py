"""Launches the kernel for up to 8 tokens."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rowint8.kernels.few_tokens import ROWS, few_tokens_kernel
from rowint8.kernels.launch import blocks, dependent_launch, launch, traits
from rowint8.kernels.tiles.pick import FewTokensTile

_REGISTERS = 168
"""A limit that is never reached. Without one, ptxas saves registers by asking for a block of the weight piece by piece,
and waiting each time."""


def few_tokens_product(
    tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, tile: FewTokensTile, fused: bool = False
) -> Tensor:
    """linear, or swiglu where `fused`, of contiguous 16-bit [M, K] activations, M at most 8; N and K are at least 1.

    Arguments as in `ops.linear`; compute capability 8.0 and newer.
    """
    (M, K), N = tokens.shape, values.shape[0]
    out = torch.empty(M, N // 2 if fused else N, dtype=tokens.dtype, device=tokens.device)
    variant = "few_tokens", fused, tile, N, K, traits(tokens, values, scale, bias)
    constants, options = _constants(tile, K, tokens.device, bias is not None, fused)
    grid = blocks(N, ROWS.value), 1, 1
    launch(few_tokens_kernel, variant, grid, (tokens, values, scale, bias, out, M, N, K), constants, options)
    return out


@cache
def _constants(
    tile: FewTokensTile, k: int, device: torch.device, has_bias: bool, fused: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    pdl = dependent_launch(device)
    sizes = dict(WARPS=tile.warps, CHUNK=tile.block_k // tile.warps, EVEN_K=k % tile.block_k == 0)
    options = dict(num_warps=tile.warps, maxnreg=_REGISTERS, launch_pdl=pdl)
    return dict(HAS_BIAS=has_bias, FUSED=fused, **sizes, PDL=pdl), options
