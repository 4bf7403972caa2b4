# type: ignore  # Gluon's own types do not describe device code
"""The INT8 product on Hopper, in Gluon: TMA brings tiles into shared memory, wgmma multiplies them from registers.

A program has roles that run at the same time, on warps of their own. The producer (one warp) fills a ring of stages,
each a slice of K of the weight rows and of the tokens. Two to four consumers (four warps each) widen INT8 values from
shared memory into registers, where wgmma takes its left operand, and multiply them with the tokens in shared memory:
while some widen, others multiply. Consumers lie `across` the weight's rows, `rows` rows each, and `deep`, each
with a block of K of every slice; the sums of the deep ones meet in shared memory at the end of a tile. `full` barriers
tell consumers that a stage has arrived, `empty` barriers tell the producer that all are done with it.

Programs are persistent: at most one a multiprocessor, each takes every gridDim-th tile. With `split` > 1 the K of a
tile is cut into parts, which are written as fp32 and added in order by a second kernel: results never depend on timing.

This file is device code; `hopper_product` launches it.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.widening import PAIR_TO_BF16, PAIR_TO_FP16

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
    split: int
    group: int


@gluon.jit
def _work_unit(unit, tiles_m, tiles_n, steps, SPLIT: gl.constexpr, GROUP: gl.constexpr):
    """(pid_m, pid_n, split, first K step, end K step). GROUP row blocks of the weight run together: they share L2."""
    tile = unit // SPLIT
    split = unit % SPLIT
    first_n = tile // (GROUP * tiles_m) * GROUP
    width = min(tiles_n - first_n, GROUP)
    within = tile - first_n * tiles_m
    return within // width, first_n + within % width, split, split * steps // SPLIT, (split + 1) * steps // SPLIT


@gluon.jit
def _produce(given, config: gl.constexpr):
    """Keeps the ring full, once the kernel before this one has written its output."""
    weight, x, w_ring, x_ring, full, empty, tiles_m, tiles_n, steps = given
    FUSED: gl.constexpr = config.fused
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    BLOCK_M: gl.constexpr = config.block_m
    BLOCK_K: gl.constexpr = config.block_k
    STAGES: gl.constexpr = config.stages
    SPLIT: gl.constexpr = config.split
    GROUP: gl.constexpr = config.group
    gdc_wait()
    it = 0
    for unit in range(gl.program_id(0), tiles_m * tiles_n * SPLIT, gl.num_programs(0)):
        pid_m, pid_n, _, first, end = _work_unit(unit, tiles_m, tiles_n, steps, SPLIT, GROUP)
        for step in range(first, end):
            stage = it % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
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
            it += 1


@gluon.jit
def _consume(given, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Multiplies this consumer's share of every tile of this program; the first in depth stores the result."""
    out, scale, bias, w_ring, x_ring, full, empty, sums, summed, taken, tiles_m, tiles_n, steps, M, N = given
    FUSED: gl.constexpr = config.fused
    HAS_BIAS: gl.constexpr = config.has_bias
    ACROSS: gl.constexpr = config.across
    DEEP: gl.constexpr = config.deep
    ROWS: gl.constexpr = config.rows
    BLOCK_M: gl.constexpr = config.block_m
    STAGES: gl.constexpr = config.stages
    SPLIT: gl.constexpr = config.split
    GROUP: gl.constexpr = config.group
    SIDE: gl.constexpr = CONSUMER % ACROSS
    DEPTH: gl.constexpr = CONSUMER // ACROSS
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    it = 0
    turn = 0  # tiles so far
    for unit in range(gl.program_id(0), tiles_m * tiles_n * SPLIT, gl.num_programs(0)):
        pid_m, pid_n, split, first, end = _work_unit(unit, tiles_m, tiles_n, steps, SPLIT, GROUP)
        row = (pid_n * ACROSS + SIDE) * ROWS
        factor, offset = _factors(scale, bias, row, N, ROWS, FUSED, HAS_BIAS, ACC)
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, ACC)
        w = _widened(w_ring, x_ring, full, it, CONSUMER, config, ACC)
        for _ in range(first + 1, end):
            stage = it % STAGES
            acc = warpgroup_mma(w, x_ring.index(stage * DEEP + DEPTH).permute((1, 0)), acc, is_async=True)
            w = _widened(w_ring, x_ring, full, it + 1, CONSUMER, config, ACC)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage), count=1)
            it += 1
        acc = warpgroup_mma(w, x_ring.index(it % STAGES * DEEP + DEPTH).permute((1, 0)), acc)
        mbarrier.arrive(empty.index(it % STAGES), count=1)
        it += 1
        if DEPTH > 0:
            _hand_over(acc, sums, summed, taken, turn, CONSUMER - ACROSS)
        else:
            for depth in gl.static_range(1, DEEP):
                acc += _taken_over(sums, summed, taken, turn, (depth - 1) * ACROSS + SIDE, ACC)
            token = pid_m * BLOCK_M
            if FUSED:
                _store(_swiglu(acc * factor[:, None]), out, row // 2, token, M, N // 2)
            elif SPLIT > 1:
                part = split * tiles_n * ACROSS * ROWS + row
                _store_part(acc, out + part.to(gl.int64) * (tiles_m * BLOCK_M) + token, tiles_m * BLOCK_M, ACC)
            else:
                _store(acc * factor[:, None] + offset[:, None], out, row, token, M, N)
        turn += 1  # noqa: SIM113


@gluon.jit
def _widened(w_ring, x_ring, full, it, CONSUMER: gl.constexpr, config: gl.constexpr, ACC: gl.constexpr):
    """This consumer's [ROWS, BLOCK_K] of K step `it` in the activations' dtype, once they have arrived."""
    ROWS: gl.constexpr = config.rows
    BLOCK_K: gl.constexpr = config.block_k
    STAGES: gl.constexpr = config.stages
    CONSUMERS: gl.constexpr = config.across * config.deep
    SWIZZLE: gl.constexpr = w_ring.layout.swizzle_byte_width
    mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
    w = w_ring.index(it % STAGES * CONSUMERS + CONSUMER)
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
def _store_part(acc, part, stride, ACC: gl.constexpr):
    """Writes a block of unscaled fp32 sums as it lies in registers."""
    rows = gl.arange(0, acc.shape[0], gl.SliceLayout(1, ACC))
    tokens = gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))
    gl.store(part + rows[:, None] * stride + tokens[None, :], acc)


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


@gluon.jit(do_not_specialize=["M"])
def hopper_kernel(weight, x, scale, bias, out, M, N, K, config: gl.constexpr):
    """Grid: at most one program a multiprocessor. `weight` and `x` are TMA descriptors; `out` is [M, N], [M, N / 2]
    for SwiGLU, or, with a split, fp32 parts [split, N padded, M padded] of the transposed product."""
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
    tiles = (tiles_m, tiles_n, steps)
    given = (out, scale, bias) + rings + (sums, summed, taken) + tiles + (M, N)  # noqa: RUF005
    feed = (weight, x) + rings + tiles  # noqa: RUF005
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
