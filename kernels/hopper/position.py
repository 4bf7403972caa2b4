# type: ignore  # Gluon's own types do not describe device code
"""Where a tile of the Hopper kernel lies: its rows and its tokens. Device code."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def block_of(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """(pid_m, pid_n) of a tile. GROUP row blocks of the weight run together: they share L2."""
    first_n = tile // (GROUP * tiles_m) * GROUP
    width = min(tiles_n - first_n, GROUP)
    within = tile - first_n * tiles_m
    return within // width, first_n + within % width


@gluon.jit
def tokens_of(pid_m, blocks, M, config: gl.constexpr):
    """(expert, first token to be stored, the one behind the last) of a tile."""
    WIDTH: gl.constexpr = config.block_m + config.tail
    if config.grouped:
        table, most_blocks = blocks
        expert = gl.load(table + pid_m)
        new = gl.load(table + most_blocks + pid_m)
        end = gl.load(table + 2 * most_blocks + pid_m)
    else:
        expert = 0
        new = pid_m * WIDTH
        end = M
    return expert, new, end


@gluon.jit
def first_token(new, M, WIDTH: gl.constexpr):
    """Where a tile's tokens begin: the last tile ends at M, and what it shares with the one before is stored once."""
    return gl.maximum(gl.minimum(new, M - WIDTH), 0)


@gluon.jit
def tail_token(first, M, config: gl.constexpr):
    """Where the tokens of a tile's second part begin; where M is less than a tile's width, the parts overlap."""
    BLOCK_M: gl.constexpr = config.block_m
    TAIL: gl.constexpr = config.tail
    return gl.maximum(gl.minimum(first + BLOCK_M, M - TAIL), 0)
