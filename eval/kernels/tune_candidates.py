"""The tiles that `rowint8 tune` tries: what a card's memory and registers allow, near sizes that have done well."""

from itertools import product

from rowint8.kernels.tiles.hopper_cost import hopper_candidates
from rowint8.kernels.tiles.types import MOST_FEW_TOKENS, FewTokensTile, Tile, TritonTile

_ITEMSIZE = 2
"""Bytes of an activation: tables are for 16 bits."""
_FEW = 16
_POINTERS_ON_HOPPER = 32
"""Beyond this many tokens a Hopper card has nothing to gain from the kernels that read through pointers."""


def candidates(op: str, m: int, shared_memory: int, on_hopper: bool) -> list[Tile]:
    """Tiles for `op` on m tokens.

    Args:
        shared_memory: bytes that one program may use on the card.
    """
    tiles: list[Tile] = []
    if m <= _POINTERS_ON_HOPPER or not on_hopper:
        made = _one_token(op) if m == 1 else _few_tokens() if m <= _FEW else _many_tokens(m)
        tiles += [tile for tile in made if tile.shared_memory(_ITEMSIZE) <= shared_memory]
    if 1 < m <= MOST_FEW_TOKENS:
        tiles += [FewTokensTile(warps, warps * block_k) for warps, block_k in product((2, 4, 8), (128, 256))]
    return [*tiles, *(hopper_candidates(op, m) if on_hopper and m > 1 else ())]


def _one_token(op: str) -> list[TritonTile]:
    """8 to 64 weights of a step for each thread; SwiGLU has rows in pairs."""
    rows = (2, 4, 8) if op == "swiglu" else (1, 2, 4, 8)
    return [
        TritonTile(1, n, k, warps, 1, overlaps=True)
        for n, k, warps in product(rows, (512, 1024, 2048), (1, 2, 4))
        if 16 <= n * k // (32 * warps) <= 64
    ]


def _few_tokens() -> list[TritonTile]:
    """8 to 32 KiB of weights in a stage; the small ones are cut into slices, or have few warps."""
    return [
        TritonTile(_FEW, n, k, warps, stages, slices=slices, overlaps=True)
        for n, k, (warps, slices), stages in product((16, 32, 64), (128, 256, 512), ((2, 1), (4, 4), (4, 1)), (3, 4))
        if 4096 <= n * k <= 16384 and (slices == 1 or n * k == 8192 or n == 16) and n // 16 <= warps * 2
    ]


def _many_tokens(m: int) -> list[TritonTile]:
    """Blocks of about m tokens, at most 256; 32 to 64 sums for each thread."""
    most = min(256, max(32, 1 << (m - 1).bit_length()))
    sizes = [size for size in (32, 64, 128, 256) if most // 4 <= size <= most]
    return [
        TritonTile(block_m, n, k, warps, stages)
        for block_m, n, k, warps, stages in product(sizes, (32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4))
        if 8 <= block_m * n // (32 * warps) <= 64 and 4096 <= n * k <= 16384 and k * block_m <= 16384
    ]
