"""A step's tokens as tensors: the chunks of all requests laid end to end, without padding."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rowint8.baseline_engine.block_pool import SCRATCH_BLOCK
from rowint8.baseline_engine.scheduler import Chunk


class Batch(NamedTuple):
    """What a step sends besides block tables: numbers for each of T tokens and each of B sequences, on one device."""

    tokens: Tensor
    """int32 [T]; read where `sources` is negative."""
    sources: Tensor
    """int32 [T]: the row of the step before whose sampled token it is, or -1."""
    positions: Tensor
    """int32 [T]."""
    slots: Tensor
    """int32 [T]: block * block_size + offset."""
    seq_lens: Tensor
    """int32 [B]."""
    query_start: Tensor
    """int32 [B + 1]."""
    logit_rows: Tensor
    """int32 [number of sequences that sample]: the last token of each."""


def pack(chunks: Sequence[Chunk], block_size: int, unused: Sequence[int] = ()) -> tuple[np.ndarray, list[int]]:
    """The parts of a `Batch` as one int32 array, and their sizes.

    Behind the chunks come sequences that nobody uses, with as many tokens each as `unused` says, in the scratch block.
    """
    tokens, sources, positions, slots = [], [], [], []
    for request, first, count, _ in chunks:
        known = request.tokens[first : first + count]
        tokens += known
        sources += [-1] * len(known)
        if len(known) < count:
            tokens.append(0)
            sources.append(request.sampled_row)
        positions += range(first, first + count)
        blocks = request.blocks
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(first, first + count)]
    seq_lens = [chunk.first + chunk.count for chunk in chunks]
    query_start = [0, *accumulate(chunk.count for chunk in chunks)]
    logit_rows = [end - 1 for end, chunk in zip(query_start[1:], chunks, strict=True) if chunk.samples]
    scratch = SCRATCH_BLOCK * block_size
    for part, value in ((tokens, 0), (sources, -1), (positions, 0), (slots, scratch)):
        part += [value] * sum(unused)
    seq_lens += unused
    query_start += accumulate(unused, initial=query_start.pop())
    logit_rows += [0] * (len(seq_lens) - len(logit_rows)) if unused else []
    parts = (tokens, sources, positions, slots, seq_lens, query_start, logit_rows)
    arrays = [np.asarray(part, dtype=np.int32) for part in parts]
    return np.concatenate(arrays), [len(part) for part in parts]


def block_tables(chunks: Sequence[Chunk], rows: int) -> np.ndarray:
    """int32 [rows, most blocks of a sequence], filled up with the scratch block."""
    tables = np.full((rows, max(len(chunk.request.blocks) for chunk in chunks)), SCRATCH_BLOCK, np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.request.blocks)] = chunk.request.blocks
    return tables
