# type: ignore  # Gluon's own types do not describe device code
"""How a consumer of the Hopper kernel multiplies its share of the ring. Device code."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from rowint8.kernels.int8_convert import PAIR_TO_BF16, PAIR_TO_FP16

_memory = gl.shared_memory_descriptor
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret
"""Renamed after Triton 3.6."""


@gluon.jit
def after(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and whether it is filled for an even or an odd time."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def sum_widened(rings, acc, tail, steps, stage, phase, CONSUMER: gl.constexpr, config: gl.constexpr):
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
        stage, phase = after(stage, phase, STAGES)
        w = _widened(w_ring, x_ring, full, stage, phase, CONSUMER, config, ACC)
        acc, tail = _multiplied(acc, tail, TAIL, 0)
        mbarrier.arrive(empty.index(done), count=1)
    acc, tail = _multiply(w, x_ring, tail_ring, stage * DEEP + DEPTH, acc, tail, TAIL, SECOND)
    acc, tail = _multiplied(acc, tail, TAIL, 0)
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = after(stage, phase, STAGES)
    return acc, tail, stage, phase


@gluon.jit
def sum_int8(rings, acc, tail, steps, stage, phase, CONSUMER: gl.constexpr, config: gl.constexpr):
    """The same for INT8 tokens: both operands are in shared memory, and a stage is done when the next one has begun."""
    STAGES: gl.constexpr = config.stages
    TAIL: gl.constexpr = config.tail
    empty = rings[4]
    acc, tail = _multiply_int8(rings, acc, tail, stage, phase, CONSUMER, config)
    for _ in range(1, steps):
        done = stage
        stage, phase = after(stage, phase, STAGES)
        acc, tail = _multiply_int8(rings, acc, tail, stage, phase, CONSUMER, config)
        mbarrier.arrive(empty.index(done), count=1)
    acc, tail = _multiplied(acc, tail, TAIL, 0)
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = after(stage, phase, STAGES)
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
