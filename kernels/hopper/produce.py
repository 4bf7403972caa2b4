# type: ignore  # Gluon's own types do not describe device code
"""The producer of the Hopper kernel: TMA brings weights and tokens into the ring. Device code."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from rowint8.kernels.hopper.multiply import after
from rowint8.kernels.hopper.position import block_of, first_token, tail_token, tokens_of
from rowint8.kernels.hopper.stream_k import share, turn_steps, turns

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""Renamed after Triton 3.6."""
EARLY = gl.constexpr(2)
"""K steps whose weights are asked for before the kernel in front has ended. More of them delay the first tokens."""


@gluon.jit
def produce(given, config: gl.constexpr):
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
    _, pid_n = block_of(tile, tiles_m, tiles_n, GROUP)
    early = gl.minimum(last - first, 0 if config.grouped else min(EARLY, STAGES))
    for stage in range(early):
        _load_weight(weight, w_ring, full, stage, pid_n, first + stage, 0, config)
    gdc_wait()
    stage = 0
    phase = 0
    for turn in range(turns(tiles_m * tiles_n, waves, steps, begin, end, SHARED)):
        tile, first, last = turn_steps(turn, waves, steps, begin, end, SHARED)
        pid_m, pid_n = block_of(tile, tiles_m, tiles_n, GROUP)
        expert, new, _ = tokens_of(pid_m, blocks, M, config)
        token = first_token(new, M, BLOCK_M + TAIL)
        tail_at = tail_token(token, M, config)
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
                    _load(x_tail, [tail_at, k], full.index(stage), tail_ring.index(stage * DEEP + depth))
            stage, phase = after(stage, phase, STAGES)


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
