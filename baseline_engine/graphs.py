"""Steps as CUDA graphs, whose many launches cost one: of decoding, and with prompts.

A graph reads and writes fixed addresses and has a fixed number of rows and tokens: inputs are copied to where it reads
them, and a step takes the smallest graph that it fits. What exceeds its chunks writes to the scratch block and is not
looked at.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rowint8.baseline_engine.attention import Layout
from rowint8.baseline_engine.batch import Batch, block_tables, pack
from rowint8.baseline_engine.block_pool import SCRATCH_BLOCK
from rowint8.baseline_engine.scheduler import Chunk
from rowint8.baseline_engine.transfer import send, to_device

PROMPT_ROWS = 64
"""Rows of a captured step with prompts: one more than the most sequences, for tokens left over."""
PROMPT_CONTEXT = 4096
"""Longest context in such a step. Its attention is not split over the keys, which a long context needs."""


class Capture(NamedTuple):
    """What all graphs of one runner are captured with."""

    compute: Callable[[Batch, Layout], Tensor]
    """The step to capture: its logits."""
    device: torch.device
    block_size: int
    pool: Any
    """The graphs' memory, which they share: one replays at a time."""


class StepGraph(ABC):
    """A captured step of `rows` sequences with `num_tokens` tokens in all, and contexts up to `context` tokens."""

    def __init__(self, capture: Capture, rows: int, num_tokens: int, context: int):
        self.rows, self.num_tokens, self.context = rows, num_tokens, context
        compute, device, self._block_size, pool = capture
        width = -(-max(context, num_tokens) // self._block_size)
        unused = self.unused([])
        packed, sizes = pack([], self._block_size, unused)
        self._inputs = to_device(packed, device)
        self._tables = torch.full((rows, width), SCRATCH_BLOCK, dtype=torch.int32, device=device)
        self._sent = np.empty(0, np.int32)  # the tables that self._tables begins with
        batch = Batch(*self._inputs.split(sizes))
        longest = [width * self._block_size] * rows
        layout = Layout(batch.query_start, batch.seq_lens, self._tables, unused, longest, captured=True)
        compute(batch, layout)  # allocates workspaces and compiles what is not compiled yet
        self._replay, self._logits = capture_graph(lambda: compute(batch, layout), device, pool)

    @abstractmethod
    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the graph is large enough for a step of its kind."""

    @abstractmethod
    def unused(self, chunks: Sequence[Chunk]) -> list[int]:
        """Tokens of each of the rows behind the chunks: all that the graph computes besides."""

    def replay(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [rows, vocabulary]; the first are those of the chunks that sample. Valid until the next replay."""
        packed, _ = pack(chunks, self._block_size, self.unused(chunks))
        send(packed, self._inputs)
        tables = block_tables(chunks, self.rows)
        if not np.array_equal(tables, self._sent):  # most steps of few requests need no new block
            self._sent = np.empty(0, np.int32)  # an interrupt may leave half of it sent
            self._tables[:, : tables.shape[1]] = to_device(tables, self._tables.device)
            self._sent = tables
        self._replay()
        return self._logits


class DecodeGraph(StepGraph):
    """A step in which each sequence has one token and samples; rows left over have one token each."""

    def __init__(self, capture: Capture, rows: int, context: int):
        super().__init__(capture, rows, rows, context)

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        return len(chunks) <= self.rows

    def unused(self, chunks: Sequence[Chunk]) -> list[int]:
        return [1] * (self.rows - len(chunks))


class PromptGraph(StepGraph):
    """A step in which sequences have several tokens; one row more than the sequences takes the tokens left over."""

    def __init__(self, capture: Capture, num_tokens: int, max_seqs: int, context: int):
        rows = min(PROMPT_ROWS, max_seqs + 1, num_tokens // 2)
        super().__init__(capture, rows, num_tokens, min(context, PROMPT_CONTEXT))

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        tokens, longest = sum(chunk.count for chunk in chunks), max(chunk.first + chunk.count for chunk in chunks)
        return len(chunks) < self.rows and tokens <= self.num_tokens and longest <= self.context

    def unused(self, chunks: Sequence[Chunk]) -> list[int]:
        rows = self.rows - len(chunks)
        return [self.num_tokens - sum(chunk.count for chunk in chunks), *[0] * (rows - 1)]


def capture_graph(compute: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """A function that computes again into the tensor beside it, which a CUDA graph does without the host."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = compute()
    return graph.replay, out
