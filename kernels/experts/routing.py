"""Which tokens go to which expert, sorted on the device: nothing is read back, so that CUDA graphs can hold it.

A token and one of its experts are a *pair*; the pairs of M tokens with top-k experts each are numbered token by token,
0 to M * k - 1. Two kernels with a program for each expert sort them by expert, equals in their order (a counting sort),
and cut each expert's pairs into blocks of at most BLOCK_M, the tokens of a program.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowint8.kernels.launch import dependent_launch, launch, traits

_CHUNK = 1024
"""Pairs that a program looks at together."""


class Routing(NamedTuple):
    """Pairs sorted by expert. Those of experts that are not here are left out."""

    order: Tensor
    """int32 [pairs]: the number of the pair at each place."""
    blocks: Tensor
    """int32 [3, most_blocks]: a block's expert, its first place, and the place behind its last."""
    counts: Tensor
    """int32 [experts + 1]: each expert's pairs, then the number of blocks."""

    @property
    def block_count(self) -> Tensor:
        """int32 [1]: how many blocks there are."""
        return self.counts.narrow(0, len(self.counts) - 1, 1)

    @property
    def most_blocks(self) -> int:
        """What the host knows of the number of blocks: no routing has more."""
        return self.blocks.shape[1]


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Blocks of the worst routing: every expert that can have a pair has one more than fills its blocks."""
    used = min(pairs, experts)
    return used + (pairs - used) // block_m


@triton.jit
def expert_of(ids, expert_map, pair, mask, HAS_MAP: tl.constexpr):
    """The expert of each pair as this GPU numbers them; negative where it is not here, or the mask is not set."""
    expert = tl.load(ids + pair, mask=mask, other=-1).to(tl.int32)
    if HAS_MAP:
        expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1).to(tl.int32)
    return expert


@triton.jit
def overlap_previous(PDL: tl.constexpr):
    """The next kernel may be set up while this one runs; this one, set up early likewise, waits for the memory of the
    kernel in front. Every program must pass here, lest a kernel ends before the one in front of it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    ids, expert_map, counts, pairs, HAS_MAP: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid (experts,): counts[expert]."""
    overlap_previous(PDL)
    expert = tl.program_id(0)
    found = tl.zeros([CHUNK], tl.int32)
    for first in range(0, pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        found += (expert_of(ids, expert_map, pair, pair < pairs, HAS_MAP) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found))


@triton.jit(do_not_specialize=["pairs", "most_blocks"])
def sort_kernel(
    ids,
    expert_map,
    counts,
    order,
    blocks,
    pairs,
    most_blocks,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_MAP: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (experts,): an expert's part of `order` and of `blocks`. The last one also counts all blocks."""
    overlap_previous(PDL)
    expert = tl.program_id(0)
    others = tl.arange(0, PADDED)
    before = tl.load(counts + others, mask=others < expert, other=0)
    count = tl.load(counts + expert)
    start = tl.sum(before)
    first_block, own_blocks = tl.sum(tl.cdiv(before, BLOCK_M)), tl.cdiv(count, BLOCK_M)
    if expert == EXPERTS - 1:
        tl.store(counts + EXPERTS, first_block + own_blocks)
    for first in range(0, own_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        at, mask, place = blocks + first_block + block, block < own_blocks, start + block * BLOCK_M
        tl.store(at, tl.zeros_like(block) + expert, mask=mask)
        tl.store(at + most_blocks, place, mask=mask)
        tl.store(at + 2 * most_blocks, tl.minimum(place + BLOCK_M, start + count), mask=mask)
    for first in range(0, pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        own = (expert_of(ids, expert_map, pair, pair < pairs, HAS_MAP) == expert).to(tl.int32)
        tl.store(order + start + tl.cumsum(own, 0) - own, pair, mask=own != 0)
        start += tl.sum(own)


def route(ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int) -> Routing:
    """Sorts the pairs of contiguous ids [M, k], int32 or int64, by expert.

    Args:
        expert_map: integers, this GPU's number of each expert or -1; None where all are here.
        experts: how many are here, at least 1.
        block_m: pairs of a block.
    """
    pairs, device = ids.numel(), ids.device
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    blocks = torch.empty(3, most_blocks(pairs, experts, block_m), dtype=torch.int32, device=device)
    counts = torch.empty(experts + 1, dtype=torch.int32, device=device)
    constants: dict[str, Any] = dict(HAS_MAP=expert_map is not None, CHUNK=_CHUNK, PDL=dependent_launch(device))
    options = dict(num_warps=4, launch_pdl=constants["PDL"])
    of = traits(ids, expert_map)
    launch(count_kernel, ("count", of), (experts, 1, 1), (ids, expert_map, counts, pairs), constants, options)
    arguments = ids, expert_map, counts, order, blocks, pairs, blocks.shape[1]
    constants = dict(EXPERTS=experts, PADDED=triton.next_power_of_2(experts), BLOCK_M=block_m) | constants
    launch(sort_kernel, ("sort", of, experts, block_m), (experts, 1, 1), arguments, constants, options)
    return Routing(order, blocks, counts)
