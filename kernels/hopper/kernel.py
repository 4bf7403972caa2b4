# type: ignore  # Gluon's own types do not describe device code
"""The INT8 product on Hopper, in Gluon: TMA brings tiles into shared memory, wgmma multiplies them from registers.

A program has roles that run at the same time, on warps of their own. The producer (one warp) fills a ring of stages,
each a slice of K of the weight rows and of the tokens. Two to four consumers (four warps each) widen INT8 values from
shared memory into registers, where wgmma takes its left operand, and multiply them with the tokens in shared memory:
while some widen, others multiply. Consumers lie `across` the weight's rows, `rows` rows each, and `deep`, each
with a block of K of every slice; the sums of the deep ones meet in shared memory at the end of a tile. `full` barriers
tell consumers that a stage has arrived, `empty` barriers tell the producer that all are done with it.

Programs are persistent: at most one a multiprocessor, each takes every gridDim-th tile, or shares some with others.

This file is device code; `hopper_product` launches it.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.hopper.stream_k import announce, leave, share, take, turn_steps, turns
from rowint8.kernels.int8_convert import PAIR_TO_BF16, PAIR_TO_FP16

_memory = gl.shared_memory_descriptor
# renamed after Triton 3.6
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


class Config(NamedTuple):
    """What a compilation of the kernel depends on."""

    fused: bool
    has_bias: bool
    across: int
    deep: int
    rows: int
    block_m: int
    block_k: int
    stages: int
    shared: bool
    group: int


@gluon.jit
def _block(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """(pid_m, pid_n) of a tile. GROUP row blocks of the weight run together: they share L2."""
    first_n = tile // (GROUP * tiles_m) * GROUP
    width = min(tiles_n - first_n, GROUP)
    within = tile - first_n * tiles_m
    return within // width, first_n + within % width


@gluon.jit
def _produce(given, config: gl.constexpr):
    """Keeps the ring full, once the kernel before this one has written its output."""
    weight, x, rings, tiles = given
    w_ring, x_ring, full, empty = rings
    tiles_m, tiles_n, steps, waves = tiles
    FUSED: gl.constexpr = config.fused
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    BLOCK_M: gl.constexpr = config.block_m
    BLOCK_K: gl.constexpr = config.block_k
    STAGES: gl.constexpr = config.stages
    SHARED: gl.constexpr = config.shared
    GROUP: gl.constexpr = config.group
    gdc_wait()
    begin, end, _ = share(tiles_m * tiles_n, waves, steps)
    stage = 0
    phase = 0
    for turn in range(turns(tiles_m * tiles_n, waves, steps, begin, end, SHARED)):
        tile, first, last = turn_steps(turn, waves, steps, begin, end, SHARED)
        pid_m, pid_n = _block(tile, tiles_m, tiles_n, GROUP)
        for step in range(first, last):
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(arrived, DEEP * BLOCK_K * (ACROSS * ROWS + 2 * BLOCK_M))
            for depth in gl.static_range(DEEP):
                k = (step * DEEP + depth) * BLOCK_K
                for side in gl.static_range(ACROSS):
                    if FUSED:
                        where = [(pid_n * ACROSS + side) * (ROWS // 16), 0, 0, k]
                    else:
                        where = [(pid_n * ACROSS + side) * ROWS, k]
                    _load(weight, where, arrived, w_ring.index((stage * DEEP + depth) * ACROSS + side))
                _load(x, [pid_m * BLOCK_M, k], arrived, x_ring.index(stage * DEEP + depth))
            stage, phase = _after(stage, phase, STAGES)


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and whether it is filled for an even or an odd time."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def _consume(given, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Multiplies this consumer's share of every tile of this program; the first in depth stores the result."""
    out, scale, bias, parts, flags, rings, deeper, tiles, M, N = given
    w_ring, x_ring, full, empty = rings
    sums, summed, taken = deeper
    tiles_m, tiles_n, steps, waves = tiles
    FUSED: gl.constexpr = config.fused
    HAS_BIAS: gl.constexpr = config.has_bias
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    BLOCK_M: gl.constexpr = config.block_m
    STAGES: gl.constexpr = config.stages
    SHARED: gl.constexpr = config.shared
    GROUP: gl.constexpr = config.group
    SIDE: gl.constexpr = CONSUMER % ACROSS
    DEPTH: gl.constexpr = CONSUMER // ACROSS
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    begin, end, total = share(tiles_m * tiles_n, waves, steps)
    stage = 0
    phase = 0
    count = turns(tiles_m * tiles_n, waves, steps, begin, end, SHARED)
    for turn in range(count):
        tile, first, last = turn_steps(turn, waves, steps, begin, end, SHARED)
        pid_m, pid_n = _block(tile, tiles_m, tiles_n, GROUP)
        row = (pid_n * ACROSS + SIDE) * ROWS
        factor, offset = _factors(scale, bias, row, N, ROWS, FUSED, HAS_BIAS, ACC)
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, ACC)
        w = _widened(w_ring, x_ring, full, stage, phase, CONSUMER, config, ACC)
        for _ in range(first + 1, last):
            acc = warpgroup_mma(w, x_ring.index(stage * DEEP + DEPTH).permute((1, 0)), acc, is_async=True)
            done = stage
            stage, phase = _after(stage, phase, STAGES)
            w = _widened(w_ring, x_ring, full, stage, phase, CONSUMER, config, ACC)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(done), count=1)
        acc = warpgroup_mma(w, x_ring.index(stage * DEEP + DEPTH).permute((1, 0)), acc)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _after(stage, phase, STAGES)
        if DEPTH > 0:
            _hand_over(acc, sums, summed, taken, turn, CONSUMER - ACROSS)
        else:
            for depth in gl.static_range(1, DEEP):
                acc += _taken_over(sums, summed, taken, turn, (depth - 1) * ACROSS + SIDE, ACC)
            if SHARED:
                if first > 0:
                    leave(acc, parts, SIDE, ACROSS, ACC)
                if turn == count - 1 and begin % steps > 0:
                    announce(flags, SIDE, ACROSS)
            if first == 0:
                if SHARED:
                    acc = take(acc, parts, flags, tile, waves, steps, total, SIDE, ACROSS, ACC)
                _finish(acc, factor, offset, out, row, pid_m * BLOCK_M, M, N, FUSED)


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


@gluon.jit
def _hand_over(acc, sums, summed, taken, turn, place: gl.constexpr):
    """Leaves this consumer's sums of the tile for the first in depth, who has taken those of the tile before."""
    mbarrier.wait(taken.index(place), (turn & 1) ^ 1)
    sums.index(place).store(acc)
    mbarrier.arrive(summed.index(place), count=1)


@gluon.jit
def _taken_over(sums, summed, taken, turn, place: gl.constexpr, ACC: gl.constexpr):
    """The sums that a deeper consumer has left."""
    mbarrier.wait(summed.index(place), turn & 1)
    acc = sums.index(place).load(ACC)
    mbarrier.arrive(taken.index(place), count=1)
    return acc


@gluon.jit
def _factors(scale, bias, row, N, ROWS: gl.constexpr, FUSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACC: gl.constexpr):
    """Scale and bias of a consumer's rows, read before the tile is multiplied: nobody waits for them after it."""
    n = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    if FUSED:  # eight gate rows and their eight up rows in turn
        i = row // 2 + n // 16 * 8 + n % 8
        rows, mask = i + n // 8 % 2 * (N // 2), i < N // 2
    else:
        rows, mask = row + n, row + n < N
    factor = gl.load(scale + rows, mask=mask, other=0.0).to(gl.float32)
    offset = gl.zeros_like(factor)
    if HAS_BIAS:
        offset = gl.load(bias + rows, mask=mask, other=0.0).to(gl.float32)
    return factor, offset


@gluon.jit
def _swiglu(acc):
    """[R, BM] with eight gate rows and their eight up rows in turn -> silu(gate) * up [R / 2, BM]."""
    ROWS: gl.constexpr = acc.shape[0]
    gate, up = acc.reshape([ROWS // 16, 2, 8, acc.shape[1]]).permute((0, 2, 3, 1)).split()
    return (gate / (1.0 + gl.exp(-gate)) * up).reshape([ROWS // 2, acc.shape[1]])


@gluon.jit
def _finish(acc, factor, offset, out, row, token, M, N, FUSED: gl.constexpr):
    if FUSED:
        _store(_swiglu(acc * factor[:, None]), out, row // 2, token, M, N // 2)
    else:
        _store(acc * factor[:, None] + offset[:, None], out, row, token, M, N)


@gluon.jit
def _store(acc, out, row, token, M, N):
    """Writes a block of out^T, eight neighbouring outputs of a token per thread."""
    R: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [R // 8, 32 // (R // 8)], [1, 4], [0, 1])
    block = gl.convert_layout(acc.to(out.dtype.element_ty), LAYOUT)
    rows = row + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    tokens = (token + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))).to(gl.int64)
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    gl.store(out + tokens[None, :] * N + rows[:, None], block, mask=mask)


@gluon.jit(do_not_specialize=["M", "waves"])
def hopper_kernel(weight, x, scale, bias, out, parts, flags, M, N, K, waves, config: gl.constexpr):
    """Grid: at most one program a multiprocessor. `weight` and `x` are TMA descriptors; `out` is [M, N], or [M, N / 2]
    for SwiGLU. Where programs share tiles, fp32 `parts` have room for the sums of one tile of each, zero int32 `flags`
    one for each consumer that has sums, and each program takes `waves` whole tiles."""
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    BLOCK_M: gl.constexpr = config.block_m
    BLOCK_K: gl.constexpr = config.block_k
    STAGES: gl.constexpr = config.stages
    CONSUMERS: gl.constexpr = ACROSS * DEEP
    HANDED: gl.constexpr = max(CONSUMERS - ACROSS, 1)
    gdc_launch_dependents()
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES * CONSUMERS] + weight.block_type.shape, weight.layout)  # noqa: RUF005
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * DEEP, BLOCK_M, BLOCK_K], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=4, order=[1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [HANDED, ROWS if DEEP > 1 else 1, BLOCK_M], SUMS)
    summed = gl.allocate_shared_memory(gl.int64, [HANDED, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [HANDED, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(HANDED):
        mbarrier.init(summed.index(place), count=1)
        mbarrier.init(taken.index(place), count=1)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, ACROSS * ROWS)
    steps = gl.cdiv(K, DEEP * BLOCK_K)
    rings = (w_ring, x_ring, full, empty)
    tiles = (tiles_m, tiles_n, steps, waves)
    given = (out, scale, bias, parts, flags, rings, (sums, summed, taken), tiles, M, N)
    feed = (weight, x, rings, tiles)
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
