"""The products of a mixture of experts, device code: gate and up with their activation, down, and the weighted sum.

Weights are stacked: values int8 [experts, rows, K], scale fp16 [experts, rows]. FUSED is gate_up, whose N outputs have
2N rows, as in `triton_matmul`.

Sorted (`grouped_kernel`): a program has some rows of an expert and a block of its pairs. gate_up writes `hidden`
[pairs, I] by place; down writes `parts` [pairs, H] by the pair's number, weighted; `sum_kernel` adds a token's parts in
the order of its experts. Nothing is added atomically, so that the same input gives the same bits.

Each pair on its own (`pairs_gate_up_kernel`, `pairs_down_kernel`): for so few pairs that hardly two share an expert.
Then nothing is sorted, and down adds up a token's experts itself.
"""

import triton
import triton.language as tl

from rowint8.kernels.experts.routing import expert_of, overlap_previous
from rowint8.kernels.one_token import vector_product, widened_to_fp32
from rowint8.kernels.shared_device_code import silu_times, weight_rows
from rowint8.kernels.triton_matmul import grid_position, plain_dot_product, sliced_dot_product

_RUN = tl.constexpr(8)
"""Neighbours in K that a thread loads: 16 bytes of 16-bit activations."""


@triton.jit
def _activated(gate, up, OAI: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The activation between the products, in fp32: see `ops.experts`."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if OAI:
        gate, up = gate * ALPHA, (up + 1) / ALPHA
    return silu_times(gate, up)


@triton.jit
def _rows_of(pid, expert, N, BLOCK_N: tl.constexpr, FUSED: tl.constexpr, OAI: tl.constexpr):
    """Rows int64 [BN] among those of all experts, alternately gate and up where FUSED, clamped in range. OAI weights
    have them so in memory."""
    rows = weight_rows(pid, 2 * N if FUSED and OAI else N, BLOCK_N, FUSED and not OAI)  # type: ignore
    return rows + expert.to(tl.int64) * (2 * N if FUSED else N)


@triton.jit
def _block_of_an_expert(
    x,
    values,
    scale,
    bias,
    pair_weights,
    out,
    order,
    rows,
    first,
    end,
    pid_n,
    M,
    N,
    K,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOPK: tl.constexpr,
    OAI: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """The pairs at places `first` to `end`, at most WIDTH. M: rows of x."""
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if FUSED else BLOCK_N
    place = first + tl.arange(0, WIDTH)
    here = place < end
    pair = tl.load(order + place, mask=here, other=0).to(tl.int64)
    tokens = tl.where(here, pair // TOPK if FUSED else place.to(tl.int64), M)  # row M of x is not read
    if SLICES > 1:
        acc = sliced_dot_product(x, values, rows, tokens, M, K, BLOCK_N, WIDTH, BLOCK_K, SLICES, EVEN_K, DOT)
    else:
        acc = plain_dot_product(x, values, rows, tokens, M, K, BLOCK_N, WIDTH, BLOCK_K, EVEN_K, DOT)
    acc *= tl.load(scale + rows).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    if FUSED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [OUTPUTS, 2, WIDTH]), [0, 2, 1]))
        result, to = _activated(gate, up, OAI, ALPHA, LIMIT), place.to(tl.int64)
    else:
        result, to = acc * tl.load(pair_weights + pair, mask=here, other=0.0).to(tl.float32)[None, :], pair
    n = pid_n * OUTPUTS + tl.arange(0, OUTPUTS)
    tl.store(out + to[None, :] * N + n[:, None], result.to(out.dtype.element_ty), mask=(n < N)[:, None] & here[None, :])


@triton.jit(do_not_specialize=["M", "most_blocks"])
def grouped_kernel(
    x,
    values,
    scale,
    bias,
    pair_weights,
    out,
    order,
    blocks,
    counts,
    M,
    N,
    K,
    most_blocks,
    EXPERTS: tl.constexpr,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOPK: tl.constexpr,
    OAI: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (most_blocks times blocks of the N outputs,); programs without a block leave at once.

    FUSED: x [M, K] holds tokens, out is `hidden`. Else x is `hidden` and out `parts`.
    """
    overlap_previous(PDL)
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if FUSED else BLOCK_N
    block, pid_n = grid_position(most_blocks, tl.cdiv(N, OUTPUTS), GROUP)
    if block < tl.load(counts + EXPERTS):
        expert, first = tl.load(blocks + block), tl.load(blocks + most_blocks + block)
        end = tl.load(blocks + 2 * most_blocks + block)
        rows = _rows_of(pid_n, expert, N, BLOCK_N, FUSED, OAI)
        # fmt: off
        if NARROW > 0 and end - first <= NARROW:
            _block_of_an_expert(x, values, scale, bias, pair_weights, out, order, rows, first, end, pid_n, M, N, K,
                FUSED, HAS_BIAS, TOPK, OAI, ALPHA, LIMIT, NARROW, BLOCK_N, BLOCK_K, SLICES, EVEN_K, DOT)
        else:
            _block_of_an_expert(x, values, scale, bias, pair_weights, out, order, rows, first, end, pid_n, M, N, K,
                FUSED, HAS_BIAS, TOPK, OAI, ALPHA, LIMIT, BLOCK_M, BLOCK_N, BLOCK_K, SLICES, EVEN_K, DOT)
        # fmt: on


@triton.jit
def sum_kernel(
    parts,
    places,
    ids,
    expert_map,
    out,
    H,
    TOPK: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (M, blocks of H): a token's parts, added in the order of its experts; those that are not here are left
    out. Parts are by the pair's number or, where there are `places`, by place."""
    overlap_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOPK):  # type: ignore
        pair = token * TOPK + slot
        expert = expert_of(ids, expert_map, pair, True, HAS_MAP)
        row = pair
        if places is not None:
            row = tl.load(places + pair, mask=expert >= 0, other=0).to(tl.int64)
        total += tl.load(parts + row * H + h, mask=h < tl.where(expert >= 0, H, 0), other=0.0).to(tl.float32)
    tl.store(out + token * H + h, total.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def pairs_gate_up_kernel(
    x,
    values,
    scale,
    bias,
    out,
    ids,
    expert_map,
    N,
    K,
    TOPK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    OAI: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of the N outputs, pairs): `hidden` [pairs, N] by the pair's number."""
    overlap_previous(PDL)
    OUTPUTS: tl.constexpr = BLOCK_N // 2
    pair = tl.program_id(1).to(tl.int64)
    expert = expert_of(ids, expert_map, pair, True, HAS_MAP)
    if expert >= 0:
        rows = _rows_of(tl.program_id(0), expert, N, BLOCK_N, True, OAI)  # type: ignore
        acc = vector_product(x, values, rows, pair // TOPK, K, BLOCK_N, BLOCK_K, EVEN_K, DOT, False)  # type: ignore
        acc *= tl.load(scale + rows).to(tl.float32)
        if HAS_BIAS:
            acc += tl.load(bias + rows).to(tl.float32)
        gate, up = tl.split(tl.reshape(acc, [OUTPUTS, 2]))
        n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        result = _activated(gate, up, OAI, ALPHA, LIMIT)
        tl.store(out + pair * N + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def pairs_down_kernel(
    hidden,
    values,
    scale,
    bias,
    pair_weights,
    out,
    ids,
    expert_map,
    N,
    K,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of the N outputs, M): a token's experts side by side, so that all are read at the same time.

    SLOTS is TOPK rounded up to a power of two. Row r of a program is output r // SLOTS, slot r % SLOTS.
    """
    overlap_previous(PDL)
    ROWS: tl.constexpr = BLOCK_N * SLOTS
    r = tl.arange(0, ROWS)
    n, slot = tl.program_id(0) * BLOCK_N + r // SLOTS, r % SLOTS
    pair = tl.program_id(1).to(tl.int64) * TOPK + slot
    expert = expert_of(ids, expert_map, pair, slot < TOPK, HAS_MAP)
    here = (expert >= 0) & (n < N)
    rows = expert.to(tl.int64) * N + n
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = values + rows[:, None] * K + tl.max_contiguous(ks, _RUN)[None, :]
    x_ptrs = hidden + pair[:, None] * K + tl.max_contiguous(ks, _RUN)[None, :]
    acc = tl.zeros([ROWS, BLOCK_K // _RUN], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = here[:, None] & (ks[None, :] < K - k)
        w = tl.load(w_ptrs + k, mask=mask, other=0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k, mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(tl.reshape(widened_to_fp32(w, DOT) * x, [ROWS, BLOCK_K // _RUN, _RUN]), axis=2)
    result = tl.sum(acc, axis=1) * tl.load(scale + rows, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=here, other=0.0).to(tl.float32)
    result *= tl.load(pair_weights + pair, mask=here, other=0.0).to(tl.float32)
    total = tl.sum(tl.reshape(result, [BLOCK_N, SLOTS]), axis=1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out + tl.program_id(1).to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)
