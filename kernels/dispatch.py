"""The only chooser: operator, tokens, weight and card decide the tile, and the type of the tile decides the kernel.

A new product needs an entry in OPERATORS here and one in the table of `ops`. A new kernel needs a type of tile
(`tiles/types.py`), a place in `tiles/pick.py` and its launcher here.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rowint8.kernels.few_tokens import few_tokens_product
from rowint8.kernels.hopper.launch import hopper_product
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.pick import Product, can_run, pick_tile, tokens_between_changes
from rowint8.kernels.tiles.types import FewTokensTile, HopperTile, Tile, TritonTile
from rowint8.kernels.tiles.user import tile_for, user_tiles
from rowint8.kernels.triton_matmul import triton_product

OPERATORS = {"linear": False, "swiglu": True, "linear_int8": False, "swiglu_int8": True}
"""The products, and whether SwiGLU is fused into them. Those of INT8 tokens are called as `run_int8`."""
_LAUNCHERS: dict[type, Callable[..., Tensor]] = {
    TritonTile: triton_product,
    FewTokensTile: few_tokens_product,
    HopperTile: hopper_product,
}


def run(
    op: str, tokens: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """`op` ("linear" or "swiglu") of contiguous [M, K] activations; the others as in `ops`, already checked there.

    Args:
        tile: the one to run with, instead of the one that `choose` returns.

    Raises:
        ValueError: the tile's kernel cannot run this product.
    """
    fused = OPERATORS[op]
    if not tokens.shape[0] or not values.shape[0]:
        return tokens.new_empty(tokens.shape[0], values.shape[0] // (1 + fused))
    tile = _checked(op, tokens, values, tile)
    return _LAUNCHERS[type(tile)](tokens, values, scale, bias, tile, fused)


def run_int8(
    op: str,
    tokens: Tensor,
    token_scale: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """`op` ("linear_int8" or "swiglu_int8") of contiguous INT8 tokens [M, K]; all else as `run`."""
    fused = OPERATORS[op]
    if not tokens.shape[0] or not values.shape[0]:
        return scale.new_empty(tokens.shape[0], values.shape[0] // (1 + fused), dtype=dtype)
    tile = _checked(op, tokens, values, tile, dtype)
    return _LAUNCHERS[type(tile)](tokens, values, scale, bias, tile, fused, token_scale, dtype)


def _checked(op: str, tokens: Tensor, values: Tensor, tile: Tile | None, dtype: torch.dtype | None = None) -> Tile:
    """The tile given, if its kernel can run the product, or else the one that `choose` returns."""
    if tile is None:
        return choose(op, tokens, values, dtype=dtype)
    if tile.serves(op) and can_run(tile, _product(op, tokens, values, dtype), card_of(tokens.device)):
        return tile
    shape = f"{list(tokens.shape)} {tokens.dtype} activations and a weight {list(values.shape)}"
    raise ValueError(f"{tile} cannot run {op} of {shape} on {tokens.device}; give another tile, or none")


def choose(op: str, tokens: Tensor, values: Tensor, of_user: bool = True, dtype: torch.dtype | None = None) -> Tile:
    """The tile for contiguous activations [M, K] and an int8 weight [N, K]; M and N are at least 1.

    Args:
        of_user: whether tiles of `rowint8 tune` go before the shipped ones.
        dtype: the output's, where it is not that of the activations.

    Raises:
        ValueError: the file of the user's tiles is damaged.
    """
    return _choose(_product(op, tokens, values, dtype), tokens.device, of_user)


@cache
def _choose(product: Product, device: torch.device, of_user: bool) -> Tile:
    op, m, n, k = product[:4]
    by_tokens = user_tiles(device).get((op, n, k), {}) if of_user else {}
    return pick_tile(product, card_of(device), tile_for(by_tokens, m))


def _product(op: str, tokens: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> Product:
    """For fp32 outputs the kernels in Gluon have no shared memory left."""
    (m, k), n = tokens.shape, values.shape[0]
    by_gluon = tokens.is_cuda and dtype != torch.float32 and aligned(tokens, values)
    return Product(op, m, n, k, tokens.element_size(), by_gluon)


_ALIGNMENT = 16


def aligned(tokens: Tensor, values: Tensor) -> bool:
    """Whether the kernels in Gluon can read contiguous operands 16 bytes at a time: activations are 16-bit or INT8,
    rows and addresses are on 16 bytes, and neither is empty."""
    on_16_bytes = tokens.data_ptr() % _ALIGNMENT == 0 and values.data_ptr() % _ALIGNMENT == 0
    k = values.shape[1]
    return on_16_bytes and k > 0 and k % _ALIGNMENT == 0 and tokens.dtype in (torch.bfloat16, torch.float16, torch.int8)


def tokens_by_tile(
    op: str, token: Tensor, values: Tensor, max_tokens: int, dtype: torch.dtype | None = None
) -> dict[Tile, int]:
    """Each tile that 1 to `max_tokens` tokens like this one, [1, K], take, and the smallest number that takes it."""
    n, k = values.shape
    by_tokens = user_tiles(token.device).get((op, n, k), {})
    tiles: dict[Tile, int] = {}
    for m in tokens_between_changes(max_tokens, by_tokens):
        tiles.setdefault(choose(op, token.expand(m, -1), values, dtype=dtype), m)
    return tiles


def compilation(op: str, tile: Tile, n: int, k: int) -> tuple:
    """Products of one dtype with the same compilation share a kernel."""
    return op, tile, n % 16 == 0, k % 16 == 0, k % tile.block_k == 0
