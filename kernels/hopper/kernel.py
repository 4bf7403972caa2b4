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

This file is device code; `hopper_product` launches it.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.hopper.epilogue import factors_of, finish
from rowint8.kernels.hopper.stream_k import announce, leave, share, take, turn_steps, turns
from rowint8.kernels.int8_convert import PAIR_TO_BF16, PAIR_TO_FP16

_memory = gl.shared_memory_descriptor
# renamed after Triton 3.6
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

EARLY = gl.constexpr(2)
"""K steps whose weights are asked for before the kernel in front has ended. More of them delay the first tokens."""


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
def _block(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """(pid_m, pid_n) of a tile. GROUP row blocks of the weight run together: they share L2."""
    first_n = tile // (GROUP * tiles_m) * GROUP
    width = min(tiles_n - first_n, GROUP)
    within = tile - first_n * tiles_m
    return within // width, first_n + within % width


@gluon.jit
def _tokens_of(pid_m, blocks, M, config: gl.constexpr):
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
def _first_token(new, M, WIDTH: gl.constexpr):
    """Where a tile's tokens begin: the last tile ends at M, and what it shares with the one before is stored once."""
    return gl.maximum(gl.minimum(new, M - WIDTH), 0)


@gluon.jit
def _tail_token(first, M, config: gl.constexpr):
    """Where the tokens of a tile's second part begin; where M is less than a tile's width, the parts overlap."""
    BLOCK_M: gl.constexpr = config.block_m
    TAIL: gl.constexpr = config.tail
    return gl.maximum(gl.minimum(first + BLOCK_M, M - TAIL), 0)


@gluon.jit
def _produce(given, config: gl.constexpr):
    """Keeps the ring full. The first weights are on their way before the kernel in front has ended: nothing that runs
    beside this kernel writes weights, but the tokens may be that kernel's output."""
    weight, x, x_tail, rings, tiles, blocks, M, N = given
    w_ring, x_ring, tail_ring, full, empty = rings
    tiles_m, tiles_n, steps, waves = tiles
    DEEP: gl.constexpr = config.deep
    BLOCK_M: gl.constexpr = config.block_m
    TAIL: gl.constexpr = config.tail
    BLOCK_K: gl.constexpr = config.block_k
    STAGES: gl.constexpr = config.stages
    SHARED: gl.constexpr = config.shared
    GROUP: gl.constexpr = config.group
    begin, end, _ = share(tiles_m * tiles_n, waves, steps)
    tile, first, last = turn_steps(0, waves, steps, begin, end, SHARED)
    _, pid_n = _block(tile, tiles_m, tiles_n, GROUP)
    early = gl.minimum(last - first, 0 if config.grouped else min(EARLY, STAGES))
    for stage in range(early):
        _load_weight(weight, w_ring, full, stage, pid_n, first + stage, 0, config)
    gdc_wait()
    stage = 0
    phase = 0
    for turn in range(turns(tiles_m * tiles_n, waves, steps, begin, end, SHARED)):
        tile, first, last = turn_steps(turn, waves, steps, begin, end, SHARED)
        pid_m, pid_n = _block(tile, tiles_m, tiles_n, GROUP)
        expert, new, _ = _tokens_of(pid_m, blocks, M, config)
        token = _first_token(new, M, BLOCK_M + TAIL)
        tail_token = _tail_token(token, M, config)
        for step in range(first, last):
            if early > 0:
                early -= 1
            else:
                mbarrier.wait(empty.index(stage), phase ^ 1)
                _load_weight(weight, w_ring, full, stage, pid_n, step, expert * N, config)
            for depth in gl.static_range(DEEP):
                k = (step * DEEP + depth) * BLOCK_K
                _load(x, [token, k], full.index(stage), x_ring.index(stage * DEEP + depth))
                if TAIL > 0:
                    _load(x_tail, [tail_token, k], full.index(stage), tail_ring.index(stage * DEEP + depth))
            stage, phase = _after(stage, phase, STAGES)


@gluon.jit
def _load_weight(weight, w_ring, full, stage, pid_n, step, above, config: gl.constexpr):
    """Asks for the weights of a stage, and says how many bytes of it will come, tokens among them. `above`: rows of the
    experts before."""
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    WIDTH: gl.constexpr = config.block_m + config.tail
    BLOCK_K: gl.constexpr = config.block_k
    FUSED: gl.constexpr = config.fused
    arrived = full.index(stage)
    mbarrier.expect(arrived, DEEP * BLOCK_K * (ACROSS * ROWS + config.itemsize * WIDTH))
    for depth in gl.static_range(DEEP):
        k = (step * DEEP + depth) * BLOCK_K
        for side in gl.static_range(ACROSS):
            block = pid_n * ACROSS + side
            where = [above // 8 + block * (ROWS // 16), 0, 0, k] if FUSED else [above + block * ROWS, k]
            _load(weight, where, arrived, w_ring.index((stage * DEEP + depth) * ACROSS + side))


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and whether it is filled for an even or an odd time."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


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
        pid_m, pid_n = _block(tile, tiles_m, tiles_n, GROUP)
        expert, new, end_token = _tokens_of(pid_m, blocks, M, config)
        row = (pid_n * ACROSS + SIDE) * ROWS
        factor, offset = factors_of(scale + expert * N, bias, row, N, ROWS, FUSED, HAS_BIAS, ACC)
        acc = gl.zeros([ROWS, BLOCK_M], SUM, ACC)
        tail = gl.zeros([ROWS, max(TAIL, 8)], SUM, SECOND)
        if config.itemsize == 1:
            acc, tail, stage, phase = _sum_int8(rings, acc, tail, last - first, stage, phase, CONSUMER, config)
        else:
            acc, tail, stage, phase = _sum_widened(rings, acc, tail, last - first, stage, phase, CONSUMER, config)
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
                token = _first_token(new, M, BLOCK_M + TAIL)
                finish(acc, factor, offset, token_scale, out, row, token, new, end_token, N, FUSED)
                if TAIL > 0:
                    tail_token = _tail_token(token, M, config)
                    factors = gl.convert_layout(factor, gl.SliceLayout(1, SECOND))
                    offsets = gl.convert_layout(offset, gl.SliceLayout(1, SECOND))
                    tail_new = gl.maximum(new, token + BLOCK_M)
                    finish(tail, factors, offsets, token_scale, out, row, tail_token, tail_new, end_token, N, FUSED)


@gluon.jit
def _sum_widened(rings, acc, tail, steps, stage, phase, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Adds this consumer's share of so many stages to its sums; with them, the stage behind and its phase."""
    w_ring, x_ring, tail_ring, full, empty = rings
    ACC: gl.constexpr = acc.type.layout
    SECOND: gl.constexpr = tail.type.layout
    DEEP: gl.constexpr = config.deep
    DEPTH: gl.constexpr = CONSUMER // config.across
    TAIL: gl.constexpr = config.tail
    STAGES: gl.constexpr = config.stages
    w = _widened(w_ring, x_ring, full, stage, phase, CONSUMER, config, ACC)
    for _ in range(1, steps):
        acc, tail = _multiply(w, x_ring, tail_ring, stage * DEEP + DEPTH, acc, tail, TAIL, SECOND)
        done = stage
        stage, phase = _after(stage, phase, STAGES)
        w = _widened(w_ring, x_ring, full, stage, phase, CONSUMER, config, ACC)
        acc, tail = _multiplied(acc, tail, TAIL, 0)
        mbarrier.arrive(empty.index(done), count=1)
    acc, tail = _multiply(w, x_ring, tail_ring, stage * DEEP + DEPTH, acc, tail, TAIL, SECOND)
    acc, tail = _multiplied(acc, tail, TAIL, 0)
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = _after(stage, phase, STAGES)
    return acc, tail, stage, phase


@gluon.jit
def _sum_int8(rings, acc, tail, steps, stage, phase, CONSUMER: gl.constexpr, config: gl.constexpr):
    """The same for INT8 tokens: both operands are in shared memory, and a stage is done when the next one has begun."""
    STAGES: gl.constexpr = config.stages
    TAIL: gl.constexpr = config.tail
    empty = rings[4]
    acc, tail = _multiply_int8(rings, acc, tail, stage, phase, CONSUMER, config)
    for _ in range(1, steps):
        done = stage
        stage, phase = _after(stage, phase, STAGES)
        acc, tail = _multiply_int8(rings, acc, tail, stage, phase, CONSUMER, config)
        mbarrier.arrive(empty.index(done), count=1)
    acc, tail = _multiplied(acc, tail, TAIL, 0)
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = _after(stage, phase, STAGES)
    return acc, tail, stage, phase


@gluon.jit
def _multiply_int8(rings, acc, tail, stage, phase, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Begins to add a stage, once it has arrived, and waits for the stage before."""
    w_ring, x_ring, tail_ring, full, _ = rings
    BLOCK_K: gl.constexpr = config.block_k
    CONSUMERS: gl.constexpr = config.across * config.deep
    SWIZZLE: gl.constexpr = w_ring.layout.swizzle_byte_width
    mbarrier.wait(full.index(stage), phase)
    w = w_ring.index(stage * CONSUMERS + CONSUMER)
    w = _reinterpret(w, gl.int8, [config.rows, BLOCK_K], gl.NVMMASharedLayout(SWIZZLE, 8, 2))
    place = stage * config.deep + CONSUMER // config.across
    acc = warpgroup_mma(w, x_ring.index(place).permute((1, 0)), acc, is_async=True)
    if config.tail > 0:
        tail = warpgroup_mma(w, tail_ring.index(place).permute((1, 0)), tail, is_async=True)
    return _multiplied(acc, tail, config.tail, 1)


@gluon.jit
def _multiply(w, x_ring, tail_ring, place, acc, tail, TAIL: gl.constexpr, SECOND: gl.constexpr):
    """Begins to add w times both parts of the tokens."""
    acc = warpgroup_mma(w, x_ring.index(place).permute((1, 0)), acc, is_async=True)
    if TAIL > 0:
        w_too = gl.convert_layout(w, gl.DotOperandLayout(0, SECOND, k_width=2), assert_trivial=True)
        tail = warpgroup_mma(w_too, tail_ring.index(place).permute((1, 0)), tail, is_async=True)
    return acc, tail


@gluon.jit
def _multiplied(acc, tail, TAIL: gl.constexpr, BEHIND: gl.constexpr):
    """The sums, once all stages but so many are in them."""
    if TAIL > 0:
        acc, tail = warpgroup_mma_wait(2 * BEHIND, deps=[acc, tail])
    else:
        acc = warpgroup_mma_wait(BEHIND, deps=[acc])
    return acc, tail


@gluon.jit
def _widened(w_ring, x_ring, full, stage, phase, CONSUMER: gl.constexpr, config: gl.constexpr, ACC: gl.constexpr):
    """This consumer's [ROWS, BLOCK_K] of a stage in the activations' dtype, once they have arrived."""
    ROWS: gl.constexpr = config.rows
    BLOCK_K: gl.constexpr = config.block_k
    CONSUMERS: gl.constexpr = config.across * config.deep
    SWIZZLE: gl.constexpr = w_ring.layout.swizzle_byte_width
    mbarrier.wait(full.index(stage), phase)
    w = w_ring.index(stage * CONSUMERS + CONSUMER)
    ring = _reinterpret(w, gl.int16, [ROWS, BLOCK_K // 2], gl.NVMMASharedLayout(SWIZZLE, 16, 2))
    pairs = ring.load(gl.DotOperandLayout(0, ACC, k_width=1))
    ASM: gl.constexpr = PAIR_TO_BF16 if x_ring.dtype == gl.bfloat16 else PAIR_TO_FP16
    low, high = gl.inline_asm_elementwise(
        ASM, "=h,=h,h", [pairs], dtype=(x_ring.dtype, x_ring.dtype), is_pure=True, pack=1
    )
    both = gl.join(low, high).reshape([ROWS, BLOCK_K])
    return gl.convert_layout(both, gl.DotOperandLayout(0, ACC, k_width=2), assert_trivial=True)


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
            [(_consume, (given, 0, config)), (_consume, (given, 1, config)), (_produce, (feed, config))],
            [4, 1],
            [232, 24],
        )
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (given, 0, config)),
                (_consume, (given, 1, config)),
                (_consume, (given, 2, config)),
                (_produce, (feed, config)),
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
                (_produce, (feed, config)),
            ],
            [4, 4, 4, 1],
            [112, 112, 112, 24],
        )
