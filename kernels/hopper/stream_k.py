# type: ignore  # Gluon's own types do not describe device code
"""Device code for tiles of the Hopper kernel that programs share along K ("stream-K": Osama et al., arXiv:2301.03598).

Whole tiles for every program leave most multiprocessors idle in the last wave. So a program takes `waves` whole tiles
and then, of all K steps of the tiles that are left, as many as every other program. If these begin inside a tile, its
sums are left in memory for the program whose steps begin that tile, which takes them, in order, at the end of its own.
Results therefore never depend on timing. Nobody waits for a program of a higher index, which may not run yet.

Each consumer leaves its sums to the same consumer of the other program, and a flag tells of them. It is zero before a
launch and after it. Neither reads its thread's number nor votes in a warp: with that, ptxas keeps addresses of the
loop over K in each thread's registers, and the loop takes up to 1.45 times as long.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Renamed after Triton 3.6."""
FLAG = gl.constexpr(32)
"""int32 from one flag to the next: 128 bytes, lest programs that wait slow each other down."""
_AWAIT = gl.constexpr(
    """{
        .reg .pred down;
    AGAIN:
        ld.acquire.gpu.global.u32 $0, [$1];
        setp.eq.u32 down, $0, 0;
        @down nanosleep.u32 64;
        @down bra.uni AGAIN;
    }"""
)
"""All lanes of a warp see the same."""


@gluon.jit
def share(tiles, waves, steps):
    """(first, end, of all) K steps of this program, counted from the first tile that is not taken whole.

    Its rank among the shares is its index from behind.
    """
    programs = gl.num_programs(0)
    total = (tiles - waves * programs) * steps
    rank = programs - 1 - gl.program_id(0)
    return rank * total // programs, (rank + 1) * total // programs, total


@gluon.jit
def turns(tiles, waves, steps, begin, end, SHARED: gl.constexpr):
    """How many tiles this program works at."""
    if SHARED:
        return waves + gl.cdiv(end, steps) - begin // steps
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def turn_steps(turn, waves, steps, begin, end, SHARED: gl.constexpr):
    """(tile, first K step, end K step) of this program's turn."""
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    first = 0
    last = steps
    if SHARED:  # noqa: SIM102  # decided by the compiler, unlike the other one
        if turn >= waves:
            behind = begin // steps + turn - waves
            first = gl.maximum(begin - behind * steps, 0)
            last = gl.minimum(end - behind * steps, steps)
            tile = waves * gl.num_programs(0) + behind
    return tile, first, last


@gluon.jit
def leave(acc, parts, SIDE: gl.constexpr, ACROSS: gl.constexpr, ACC: gl.constexpr):
    """Leaves sums of a tile that another program began."""
    gl.store(_sums(parts, _own_place(SIDE, ACROSS), acc, ACC), acc)


@gluon.jit
def announce(flags, SIDE: gl.constexpr, ACROSS: gl.constexpr):
    """Says that they are there. Late, when no store is under way any more for which all would wait here."""
    _barrier()
    gl.atomic_xchg(flags + _own_place(SIDE, ACROSS) * FLAG, 1, sem="release", scope="gpu")


@gluon.jit
def helpers(tile, waves, steps, total):
    """(first, end) of the ranks that leave sums of a tile which this program began: their steps begin before its end.

    None do in a tile that is taken whole.
    """
    programs = gl.num_programs(0)
    tile_end = (tile - waves * programs + 1) * steps
    return programs - gl.program_id(0), gl.cdiv(tile_end * programs, total)


@gluon.jit
def take(
    acc,
    tail,
    parts,
    tail_parts,
    flags,
    tile,
    waves,
    steps,
    total,
    SIDE: gl.constexpr,
    ACROSS: gl.constexpr,
    TAIL: gl.constexpr,
    ACC: gl.constexpr,
    SECOND: gl.constexpr,
):
    """Adds the sums that others have left of a tile that this program began."""
    first, end = helpers(tile, waves, steps, total)
    for other in range(first, end):
        place = other * ACROSS + SIDE
        flag = flags + place * FLAG
        gl.inline_asm_elementwise(_AWAIT, "=r,l", [flag.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)
        _barrier()  # all have seen it
        gl.store(flag, 0)
        acc += gl.load(_sums(parts, place, acc, ACC), cache_modifier=".cg")
        if TAIL > 0:
            tail += gl.load(_sums(tail_parts, place, tail, SECOND), cache_modifier=".cg")
    return acc, tail


@gluon.jit
def _own_place(SIDE: gl.constexpr, ACROSS: gl.constexpr):
    """The place of this consumer's sums and flag among all."""
    return (gl.num_programs(0) - 1 - gl.program_id(0)) * ACROSS + SIDE


@gluon.jit
def _sums(parts, place, acc, ACC: gl.constexpr):
    """Pointers to the sums of a place, such that what a warp writes at once lies together."""
    rows = gl.arange(0, acc.shape[0], gl.SliceLayout(1, ACC))[:, None]
    tokens = gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))[None, :]
    within = rows // 16 * (16 * acc.shape[1]) + tokens // 8 * 128 + rows % 16 * 8 + tokens % 8
    return parts + place * (acc.shape[0] * acc.shape[1]) + within
