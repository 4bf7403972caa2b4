# type: ignore  # Gluon's own types do not describe device code
"""The INT8 product on Hopper, in Gluon: TMA brings tiles into shared memory, wgmma multiplies them from registers.

A program has roles that run at the same time, on warps of their own. The producer (one warp) fills a ring of stages,
each a slice of K of the weight rows and of the tokens. Two to four consumers (four warps each) widen INT8 values from
shared memory into registers, where wgmma takes its left operand, and multiply them with the tokens in shared memory:
while some widen, others multiply. Consumers lie `across` the weight's rows, `rows` rows each, and `deep`, each
with a block of K of every slice; the sums of the deep ones meet in shared memory at the end of a tile. `full` barriers
tell consumers that a stage has arrived, `empty` barriers tell the producer that all are done with it.

Programs are persistent: at most one a multiprocessor, each takes every gridDim-th tile, or shares some with others.

The tokens of a tile lie in two parts, the second of which may be empty. Each has its own descriptor, sums and
multiplications; the widened weights are the same. So widths between the powers of two exist, and as the last tile ends
at the last token, TMA seldom has rows to fill that do not exist, which it does slowly.

INT8 tokens are multiplied from shared memory, and nothing is widened.

This file is device code; `hopper_product` launches it.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.hopper.epilogue import factors_of, finish
from rowint8.kernels.hopper.multiply import sum_int8, sum_widened
from rowint8.kernels.hopper.position import block_of, first_token, tail_token, tokens_of
from rowint8.kernels.hopper.produce import produce
from rowint8.kernels.hopper.stream_k import announce, leave, share, take, turn_steps, turns


class Config(NamedTuple):
    """What a compilation of the kernel depends on."""

    fused: bool
    has_bias: bool
    across: int
    deep: int
    rows: int
    block_m: int
    tail: int
    block_k: int
    stages: int
    shared: bool
    group: int
    itemsize: int
    """Bytes of one activation: 2, or 1 for INT8 tokens, which are multiplied as they are."""
    grouped: bool
    """Whether the tokens of a tile are a block of one expert's."""


@gluon.jit
def _consume(given, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Multiplies this consumer's share of every tile of this program; the first in depth stores the result."""
    out, token_scale, scale, bias, parts, flags, rings, deeper, tiles, blocks, M, N = given
    sums, tail_sums, summed, taken = deeper
    tiles_m, tiles_n, steps, waves = tiles
    FUSED: gl.constexpr = config.fused
    HAS_BIAS: gl.constexpr = config.has_bias
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    BLOCK_M: gl.constexpr = config.block_m
    TAIL: gl.constexpr = config.tail
    SHARED: gl.constexpr = config.shared
    GROUP: gl.constexpr = config.group
    SUM: gl.constexpr = gl.int32 if config.itemsize == 1 else gl.float32
    DEPTH_OF_MMA: gl.constexpr = 32 // config.itemsize
    SIDE: gl.constexpr = CONSUMER % ACROSS
    DEPTH: gl.constexpr = CONSUMER // ACROSS
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, DEPTH_OF_MMA]
    )
    SECOND: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, max(TAIL, 8), DEPTH_OF_MMA]
    )
    begin, end, total = share(tiles_m * tiles_n, waves, steps)
    tail_parts = parts
    if SHARED:
        tail_parts = parts + gl.num_programs(0) * (ACROSS * ROWS * BLOCK_M)
    stage = 0
    phase = 0
    count = turns(tiles_m * tiles_n, waves, steps, begin, end, SHARED)
    for turn in range(count):
        tile, first, last = turn_steps(turn, waves, steps, begin, end, SHARED)
        pid_m, pid_n = block_of(tile, tiles_m, tiles_n, GROUP)
        expert, new, end_token = tokens_of(pid_m, blocks, M, config)
        row = (pid_n * ACROSS + SIDE) * ROWS
        factor, offset = factors_of(scale + expert * N, bias, row, N, ROWS, FUSED, HAS_BIAS, ACC)
        acc = gl.zeros([ROWS, BLOCK_M], SUM, ACC)
        tail = gl.zeros([ROWS, max(TAIL, 8)], SUM, SECOND)
        if config.itemsize == 1:
            acc, tail, stage, phase = sum_int8(rings, acc, tail, last - first, stage, phase, CONSUMER, config)
        else:
            acc, tail, stage, phase = sum_widened(rings, acc, tail, last - first, stage, phase, CONSUMER, config)
        if DEPTH > 0:
            mbarrier.wait(taken.index(CONSUMER - ACROSS), (turn & 1) ^ 1)
            sums.index(CONSUMER - ACROSS).store(acc)
            if TAIL > 0:
                tail_sums.index(CONSUMER - ACROSS).store(tail)
            mbarrier.arrive(summed.index(CONSUMER - ACROSS), count=1)
        else:
            for depth in gl.static_range(1, DEEP):
                place: gl.constexpr = (depth - 1) * ACROSS + SIDE
                mbarrier.wait(summed.index(place), turn & 1)
                acc += sums.index(place).load(ACC)
                if TAIL > 0:
                    tail += tail_sums.index(place).load(SECOND)
                mbarrier.arrive(taken.index(place), count=1)
            if SHARED:
                if first > 0:
                    leave(acc, parts, SIDE, ACROSS, ACC)
                    if TAIL > 0:
                        leave(tail, tail_parts, SIDE, ACROSS, SECOND)
                if turn == count - 1 and begin % steps > 0:
                    announce(flags, SIDE, ACROSS)
            if first == 0:
                if SHARED:
                    acc, tail = take(
                        acc, tail, parts, tail_parts, flags, tile, waves, steps, total, SIDE, ACROSS, TAIL, ACC, SECOND
                    )
                token = first_token(new, M, BLOCK_M + TAIL)
                finish(acc, factor, offset, token_scale, out, row, token, new, end_token, N, FUSED)
                if TAIL > 0:
                    tail_at = tail_token(token, M, config)
                    factors = gl.convert_layout(factor, gl.SliceLayout(1, SECOND))
                    offsets = gl.convert_layout(offset, gl.SliceLayout(1, SECOND))
                    tail_new = gl.maximum(new, token + BLOCK_M)
                    finish(tail, factors, offsets, token_scale, out, row, tail_at, tail_new, end_token, N, FUSED)


@gluon.jit(do_not_specialize=["M", "most_blocks", "waves"])
def hopper_kernel(
    weight,
    x,
    x_tail,
    token_scale,
    scale,
    bias,
    out,
    parts,
    flags,
    table,
    block_count,
    M,
    N,
    K,
    most_blocks,
    waves,
    config: gl.constexpr,
):
    """Grid: at most one program a multiprocessor. `weight` and `x` are TMA descriptors; `out` is [M, N], or [M, N / 2]
    for SwiGLU. INT8 tokens have a `token_scale`. Where programs share tiles, fp32 `parts` have room for the sums of one
    tile of each, zero int32 `flags` one for each consumer that has sums, and each program takes `waves` whole tiles.
    Where tokens are `grouped` by expert, `table` and `block_count` are `Routing`'s, M counts pairs, and weight and
    scale have the N rows of each expert in turn.
    """
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    BLOCK_M: gl.constexpr = config.block_m
    TAIL: gl.constexpr = config.tail
    BLOCK_K: gl.constexpr = config.block_k
    STAGES: gl.constexpr = config.stages
    CONSUMERS: gl.constexpr = ACROSS * DEEP
    HANDED: gl.constexpr = max(CONSUMERS - ACROSS, 1)
    gdc_launch_dependents()
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES * CONSUMERS] + weight.block_type.shape, weight.layout)  # noqa: RUF005
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * DEEP, BLOCK_M, BLOCK_K], x.layout)
    tail_ring = x_ring
    if TAIL > 0:
        tail_ring = gl.allocate_shared_memory(x.dtype, [STAGES * DEEP, TAIL, BLOCK_K], x_tail.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    SUM: gl.constexpr = gl.int32 if config.itemsize == 1 else gl.float32
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=4, order=[1, 0])
    sums = gl.allocate_shared_memory(SUM, [HANDED, ROWS if DEEP > 1 else 1, BLOCK_M], SUMS)
    tail_sums = sums
    if TAIL > 0:
        tail_sums = gl.allocate_shared_memory(SUM, [HANDED, ROWS if DEEP > 1 else 1, TAIL], SUMS)
    summed = gl.allocate_shared_memory(gl.int64, [HANDED, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [HANDED, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(HANDED):
        mbarrier.init(summed.index(place), count=1)
        mbarrier.init(taken.index(place), count=1)
    if config.grouped:
        gdc_wait()
        tiles_m = gl.load(block_count)
    else:
        tiles_m = gl.cdiv(M, BLOCK_M + TAIL)
    tiles_n = gl.cdiv(N, ACROSS * ROWS)
    steps = gl.cdiv(K, DEEP * BLOCK_K)
    rings = (w_ring, x_ring, tail_ring, full, empty)
    tiles = (tiles_m, tiles_n, steps, waves)
    blocks = (table, most_blocks)
    given = (out, token_scale, scale, bias, parts, flags, rings, (sums, tail_sums, summed, taken), tiles, blocks, M, N)
    feed = (weight, x, x_tail, rings, tiles, blocks, M, N)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(_consume, (given, 0, config)), (_consume, (given, 1, config)), (produce, (feed, config))],
            [4, 1],
            [232, 24],
        )
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (given, 0, config)),
                (_consume, (given, 1, config)),
                (_consume, (given, 2, config)),
                (produce, (feed, config)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (given, 0, config)),
                (_consume, (given, 1, config)),
                (_consume, (given, 2, config)),
                (_consume, (given, 3, config)),
                (produce, (feed, config)),
            ],
            [4, 4, 4, 1],
            [112, 112, 112, 24],
        )
