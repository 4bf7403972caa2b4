"""Which product in Gluon suits a call, if any: the others, in Triton, run on any card and tensor, and interpreted."""

import torch
from torch import Tensor

from rowint8.kernels.tiles.hopper_cost import HopperTile
from rowint8.kernels.tiles.pick import FewTokensTile, hopper_processors, pick_few_tokens_tile, pick_hopper_tile

_ALIGNMENT = 16


def gluon_tile(op: str, tokens: Tensor, values: Tensor) -> FewTokensTile | HopperTile | None:
    """The tile for contiguous operands of `op` ("linear" or "swiglu"); None where the Triton kernels take them."""
    if not tokens.is_cuda or not tokens.numel() or not values.numel() or not aligned(tokens, values):
        return None
    shape = tokens.shape[0], *values.shape
    few = pick_few_tokens_tile(op, *shape)
    processors = hopper_processors(tokens.device)
    if few is not None or not processors or (op == "swiglu" and values.shape[0] % 16):
        return few
    return pick_hopper_tile(op, *shape, processors)


def aligned(tokens: Tensor, values: Tensor) -> bool:
    """Whether contiguous operands are read 16 bytes at a time: 16-bit activations, rows and addresses on 16 bytes."""
    on_16_bytes = all(t.data_ptr() % _ALIGNMENT == 0 for t in (tokens, values)) and values.shape[1] % _ALIGNMENT == 0
    return on_16_bytes and tokens.dtype in (torch.bfloat16, torch.float16)


def gluon_product(
    tile: FewTokensTile | HopperTile,
    tokens: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    """linear, or swiglu where `fused`; `tile` from `gluon_tile`, the others as in `ops.linear`."""
    if isinstance(tile, FewTokensTile):
        from rowint8.kernels.few_tokens_product import few_tokens_product

        return few_tokens_product(tokens, values, scale, bias, tile, fused)
    from rowint8.kernels.hopper.launch import hopper_product

    return hopper_product(tokens, values, scale, bias, tile, fused)
