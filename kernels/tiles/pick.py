"""Which tile a product runs with: a pure function of operator, shape and card. Nothing is timed at run time.

The tables of Triton tiles and few-token tiles come from sweeps over the linear layers of Llama-3.1-8B on an H100 and an
H200; of Hopper tiles the one with the least estimated time is taken (`hopper_cost`). Other cards take the same Triton
tiles, cut to their shared memory, and never a `HopperTile`.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from rowint8.kernels.tiles.card import Card
from rowint8.kernels.tiles.hopper_cost import hopper_candidates, hopper_us
from rowint8.kernels.tiles.types import MOST_FEW_TOKENS, FewTokensTile, HopperTile, Tile, TritonTile

WIDE_N = 16384
"""From this many rows on, one wave of large tiles fills the card; below it, smaller tiles do better."""

_ONE_WAVE_N = 4224
"""Up to here blocks of 16 rows run at once, two on each of 132 multiprocessors."""

_LONG_K = 8192
"""From here on a narrow weight has too few rows to fill the card two by two, and rows long enough to do so singly."""

_ONE_TOKEN = TritonTile(1, 2, 1024, 1, 1, overlaps=True)
_ONE_TOKEN_MIDDLE = TritonTile(1, 2, 512, 1, 1, overlaps=True)
_ONE_TOKEN_LONG = TritonTile(1, 1, 2048, 1, 1, overlaps=True)
_SLICED = TritonTile(16, 16, 512, 4, 5, slices=4, overlaps=True)
_SLICED_MIDDLE = TritonTile(16, 16, 512, 4, 4, slices=4, overlaps=True)

# (up to this many tokens, tile for a wide weight, tile for a narrow one)
_LINEAR = (
    (16, TritonTile(16, 32, 256, 2, 4), _SLICED),
    (32, TritonTile(32, 32, 256, 4, 3), TritonTile(32, 32, 256, 4, 4)),
    (64, TritonTile(64, 64, 128, 4, 3), TritonTile(32, 64, 256, 4, 3)),
    (128, TritonTile(128, 64, 128, 4, 3), TritonTile(64, 64, 128, 4, 4)),
    (256, TritonTile(256, 128, 64, 8, 4), TritonTile(128, 64, 128, 4, 4)),
)
_SWIGLU = (
    (16, TritonTile(16, 128, 128, 8, 3), _SLICED),
    (32, TritonTile(32, 32, 128, 4, 3), TritonTile(32, 32, 256, 4, 4)),
    (64, TritonTile(64, 64, 128, 4, 2), TritonTile(32, 64, 256, 4, 3)),
    (128, TritonTile(128, 128, 128, 8, 4), TritonTile(64, 64, 128, 4, 4)),
    (256, TritonTile(256, 128, 64, 8, 4), TritonTile(128, 64, 128, 4, 4)),
)
_INT8 = (  # up to this many tokens
    (16, TritonTile(16, 64, 256, 4, 5, overlaps=True)),
    (32, TritonTile(32, 64, 256, 4, 5, overlaps=True)),
    (64, TritonTile(64, 64, 256, 4, 4, overlaps=True)),
)
_INT8_PREFILL = TritonTile(128, 128, 128, 8, 4, overlaps=True)
_PREFILL = TritonTile(256, 128, 64, 8, 4)

_FEW_WIDE = FewTokensTile(4, 1024)
_FEW_MIDDLE = FewTokensTile(8, 1024)
_FEW_NARROW = FewTokensTile(8, 2048)

_SMALL_N, _SMALL_K = 6336, 4096
"""A weight with at most these rows, and less than this K, is read before the Hopper kernel has started."""


class Product(NamedTuple):
    """What a tile is chosen for."""

    op: str
    """A key of `dispatch.OPERATORS`."""
    m: int
    """Tokens."""
    n: int
    """Weight rows."""
    k: int
    itemsize: int
    """Bytes of one activation."""
    aligned: bool
    """Whether the kernels in Gluon can read the operands: see `dispatch.aligned`."""


def pick_tile(product: Product, card: Card, tuned: Tile | None = None) -> Tile:
    """The tile for a product on a card.

    Args:
        tuned: what `rowint8 tune` found for 16-bit activations there. Where its kernel cannot run the product, a
            shipped tile of the Triton kernels is taken.
    """
    if tuned is not None and product.itemsize == 2:
        if can_run(tuned, product, card):
            return fit(tuned, product.itemsize, card) if isinstance(tuned, TritonTile) else tuned
        return pick_triton_tile(product, card)
    few = pick_few_tokens_tile(product.m, product.n)
    if few and few.serves(product.op) and can_run(few, product, card):
        return few
    hopper = pick_hopper_tile(*product[:4], card.hopper_processors) if _runs_hopper(product, card) else None
    return hopper or pick_triton_tile(product, card)


def can_run(tile: Tile, product: Product, card: Card) -> bool:
    """Whether the tile's kernel is one for the product, and for the card."""
    if isinstance(tile, FewTokensTile):
        return product.aligned and 1 < product.m <= MOST_FEW_TOKENS
    return _runs_hopper(product, card) if isinstance(tile, HopperTile) else True


def _runs_hopper(product: Product, card: Card) -> bool:
    """A weight of SwiGLU is read in blocks of eight gate rows and their up rows."""
    return product.aligned and card.hopper_processors > 0 and (product.op.startswith("linear") or product.n % 16 == 0)


def pick_few_tokens_tile(m: int, n: int) -> FewTokensTile | None:
    """The tile of the kernel for few tokens, on any card; None for other numbers of tokens."""
    if not 1 < m <= MOST_FEW_TOKENS:
        return None
    return _FEW_NARROW if n <= _ONE_WAVE_N else _FEW_WIDE if n >= WIDE_N else _FEW_MIDDLE


def pick_hopper_tile(op: str, m: int, n: int, k: int, processors: int) -> HopperTile | None:
    """The tile of the Hopper kernel with the least estimated time; None where the kernels without TMA are faster.

    Args:
        processors: multiprocessors of the card.
    """
    if not op.endswith("_int8") and (m == 1 or (m <= 16 and op == "linear" and n <= _SMALL_N and k < _SMALL_K)):
        return None
    return min(hopper_candidates(op, m), key=lambda tile: hopper_us(tile, m, n, k, processors))


def pick_triton_tile(product: Product, card: Card) -> TritonTile:
    """The tile of the Triton kernels, which run every product on every card."""
    op, m, n, k, itemsize, _ = product
    if op.endswith("_int8"):
        return fit(next((tile for most, tile in _INT8 if m <= most), _INT8_PREFILL), itemsize, card)
    middle = _ONE_WAVE_N < n < WIDE_N
    if m == 1 and op == "linear" and k >= _LONG_K and n < WIDE_N:
        return _ONE_TOKEN_LONG
    if m == 1:
        return _ONE_TOKEN_MIDDLE if middle else _ONE_TOKEN
    if m <= 16 and middle:
        return fit(_SLICED_MIDDLE, itemsize, card)
    for max_m, wide, narrow in _SWIGLU if op == "swiglu" else _LINEAR:
        if m <= max_m:
            return fit(wide if n >= WIDE_N else narrow, itemsize, card)
    return fit(_PREFILL, itemsize, card)


def fit(tile: TritonTile, itemsize: int, card: Card) -> TritonTile:
    """Cuts the pipeline, then the block of K, until the tile fits the card."""
    while tile.shared_memory(itemsize) > card.shared_memory and tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    while tile.shared_memory(itemsize) > card.shared_memory and tile.block_k > 32 * tile.slices:
        tile = replace(tile, block_k=tile.block_k // 2)
    return tile


_STEP = 8
"""Choices change only beyond multiples of this number of tokens, of which every width of a tile is one."""
_FEW = 16
"""Up to here each number of tokens may have a choice of its own."""


def tokens_between_changes(max_tokens: int, tuned_up_to: Iterable[int]) -> list[int]:
    """Numbers of tokens, ascending, among which is one for every tile that any number up to `max_tokens` takes.

    Args:
        tuned_up_to: up to how many tokens each tile of the user goes.
    """
    changes = {1, *range(_FEW, max_tokens, _STEP), *tuned_up_to, max_tokens}
    few = range(1, _FEW)
    return sorted(m for m in {*few, *changes, *(m + 1 for m in changes)} if m <= max_tokens)
