"""Runs the model over a step's chunks: packs them into tensors, replays a CUDA graph where one fits, samples.

    host                                          device
    chunks -> numpy arrays -> pinned memory  ->  tokens, positions, slots, lengths, tables
                                                  embedding, layers, logits      (one graph where one fits)
                                                  sampler -> `sampled`, which the next step's tokens may come from
    StepResult.read  <-------------------------   copy of the tokens, awaited when they are needed

`launch` only queues work on a GPU. A step may therefore be launched before the tokens of the one before it have been
read: they are then taken from `sampled` on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rowint8.baseline_engine.attention import AttentionBackend, Layout
from rowint8.baseline_engine.block_pool import SCRATCH_BLOCK
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.model import Decoder
from rowint8.baseline_engine.request import Request
from rowint8.baseline_engine.sampler import Sampled, TokenLogprobs, sample
from rowint8.baseline_engine.scheduler import Chunk
from rowint8.baseline_engine.transfer import send, to_device

PROMPT_ROWS = 64
"""Rows of a captured step with prompts: one more than the most sequences, for tokens left over."""
PROMPT_CONTEXT = 4096
"""Longest context in such a step. Its attention is not split over the keys, which a long context needs."""


@dataclass
class StepResult:
    """The tokens that a step samples, on their way to the host."""

    requests: list[Request]
    """In the order of the rows."""
    _sampled: Sampled
    _ready: torch.cuda.Event | None

    def read(self) -> list[tuple[Request, int, TokenLogprobs | None]]:
        """Waits for the device; (request, token, logprobs where the request asked for them) for each row."""
        if self._ready is not None:
            self._ready.synchronize()
        logprobs, top_ids = (None if part is None else part.tolist() for part in self._sampled[1:])
        rows = []
        for row, (request, token) in enumerate(zip(self.requests, self._sampled.tokens.tolist(), strict=True)):
            wanted = request.sampling.params.logprobs
            report = None
            if wanted is not None and logprobs is not None and top_ids is not None:
                chosen, *top = logprobs[row]
                report = TokenLogprobs(chosen, dict(zip(top_ids[row][:wanted], top, strict=False)))
            rows.append((request, token, report))
        return rows


class _Vectors(NamedTuple):
    """What a step sends besides block tables: numbers for each of T tokens and each of B sequences, on one device."""

    tokens: Tensor
    """int32 [T]; only where `sources` is negative."""
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

    @staticmethod
    def pack(chunks: Sequence[Chunk], block_size: int, unused: Sequence[int] = ()) -> "tuple[np.ndarray, list[int]]":
        """One int32 array and the sizes of its parts; behind the chunks come sequences that nobody uses, of so many
        tokens each, all in the scratch block."""
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


def _tables(chunks: Sequence[Chunk], rows: int) -> np.ndarray:
    """int32 [rows, most blocks of a sequence], filled up with the scratch block."""
    tables = np.full((rows, max(len(chunk.request.blocks) for chunk in chunks)), SCRATCH_BLOCK, np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.request.blocks)] = chunk.request.blocks
    return tables


class ModelRunner:
    """The model, its cache, and what is kept on the device between steps."""

    def __init__(self, model: Decoder, cache: KvCache, attention: AttentionBackend, max_seqs: int, context: int):
        self.model, self.cache, self.attention = model, cache, attention
        self.device, self.context = model.form.device, context
        self.sampled = torch.zeros(max_seqs, dtype=torch.int64, device=self.device)
        """Of the step launched last, one row a request that sampled."""
        self.graphs: dict[int, StepGraph] = {}
        """Of decode steps, by the number of sequences."""
        self.prompt_graphs: list[StepGraph] = []
        """Of steps with prompts, by the number of tokens."""

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> StepResult:
        """Queues the step; its requests' `sampled_row` is set."""
        requests = [chunk.request for chunk in chunks if chunk.samples]
        graph = self._graph_for(chunks)
        logits = graph.replay(chunks) if graph else self._forward(chunks)
        logits = logits[: len(requests)]
        if not requests:
            return StepResult([], Sampled(torch.empty(0, dtype=torch.int64), None, None), None)
        chosen = sample(logits, [request.sampling for request in requests], [request.tokens for request in requests])
        self.sampled[: len(requests)] = chosen.tokens
        for row, request in enumerate(requests):
            request.sampled_row = row
        return self._to_host(requests, chosen)

    def _graph_for(self, chunks: Sequence[Chunk]) -> "StepGraph | None":
        decode = all(chunk.count == 1 and chunk.samples for chunk in chunks)
        graphs = self.graphs.values() if decode else self.prompt_graphs
        return next((graph for graph in graphs if graph.fits(chunks)), None)

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states [T, hidden] of all tokens of a step that samples nothing; see `scoring`."""
        return self._hidden(*self._inputs(chunks))

    def _forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [sampling sequences, vocabulary]."""
        return self.compute(*self._inputs(chunks))

    def _inputs(self, chunks: Sequence[Chunk]) -> tuple[_Vectors, Layout]:
        packed, sizes = _Vectors.pack(chunks, self.cache.block_size)
        vectors = _Vectors(*to_device(packed, self.device).split(sizes))
        lengths = [chunk.count for chunk in chunks]
        ends = [chunk.first + chunk.count for chunk in chunks]
        tables = to_device(_tables(chunks, len(chunks)), self.device)
        return vectors, Layout(vectors.query_start, vectors.seq_lens, tables, lengths, ends)

    def compute(self, vectors: _Vectors, layout: Layout) -> Tensor:
        """Logits [sampling sequences, vocabulary] of a step whose numbers are on the device."""
        hidden = self._hidden(vectors, layout)
        if len(vectors.logit_rows) < len(hidden):
            hidden = hidden[vectors.logit_rows]
        return self.model.logits(hidden)

    def _hidden(self, vectors: _Vectors, layout: Layout) -> Tensor:
        sources = vectors.sources.long()
        tokens = torch.where(sources < 0, vectors.tokens.long(), self.sampled[sources.clamp(min=0)])
        attend = self.attention.plan(layout)
        return self.model(tokens, vectors.positions, vectors.slots.long(), self.cache, attend)

    def _to_host(self, requests: list[Request], sampled: Sampled) -> StepResult:
        if self.device.type != "cuda":
            return StepResult(requests, sampled, None)
        logprobs, top_ids = (None if part is None else _pinned_copy(part) for part in sampled[1:])
        on_host = Sampled(_pinned_copy(sampled.tokens), logprobs, top_ids)
        ready = torch.cuda.Event()
        ready.record()
        return StepResult(requests, on_host, ready)

    @torch.inference_mode()
    def run_empty(self, num_tokens: int) -> None:
        """Runs the model over one made-up sequence in the scratch block: to compile it, or to see its memory."""
        blocks = -(-num_tokens // self.cache.block_size)
        packed, sizes = _Vectors.pack([], self.cache.block_size, [num_tokens])
        vectors = _Vectors(*to_device(packed, self.device).split(sizes))
        tables = torch.full((1, blocks), SCRATCH_BLOCK, dtype=torch.int32, device=self.device)
        self.compute(vectors, Layout(vectors.query_start, vectors.seq_lens, tables, [num_tokens], [num_tokens]))

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], prompt_sizes: Sequence[int]) -> None:
        """Captures a decode graph for each number of sequences, and a graph of prompts for each number of tokens where
        the attention can; they share one memory pool, the largest first."""
        pool = torch.cuda.graph_pool_handle()
        if self.attention.captures_prompts:
            most = min(PROMPT_ROWS, len(self.sampled) + 1)
            prompts = [StepGraph(self, min(most, size // 2), size, pool) for size in sorted(prompt_sizes)[::-1]]
            self.prompt_graphs = prompts[::-1]
        graphs = {rows: StepGraph(self, rows, rows, pool) for rows in sorted(sizes, reverse=True)}
        self.graphs = dict(sorted(graphs.items()))


class StepGraph:
    """A step of up to `rows` sequences as a CUDA graph (their launches cost one launch): decoding, with as many tokens
    as rows, or with prompts, of more tokens than rows.

    A graph reads and writes fixed addresses: inputs are copied to where it reads them. What exceeds the chunks writes
    to the scratch block (a token in each row left over, or all tokens left over in one row) and is not looked at.
    """

    def __init__(self, runner: ModelRunner, rows: int, num_tokens: int, pool: Any):
        self._rows, self._num_tokens, self._block_size = rows, num_tokens, runner.cache.block_size
        self._decodes = rows == num_tokens
        self._context = runner.context if self._decodes else min(runner.context, PROMPT_CONTEXT)
        width = -(-max(self._context, num_tokens) // self._block_size)
        unused = self._unused([])
        empty, sizes = _Vectors.pack([], self._block_size, unused)
        self._vectors = to_device(empty, runner.device)
        self._tables = torch.full((rows, width), SCRATCH_BLOCK, dtype=torch.int32, device=runner.device)
        self._sent = np.empty(0, np.int32)  # the tables that self._tables begins with
        vectors = _Vectors(*self._vectors.split(sizes))
        longest = [width * self._block_size] * rows
        layout = Layout(vectors.query_start, vectors.seq_lens, self._tables, unused, longest, captured=True)
        runner.compute(vectors, layout)  # allocates workspaces and compiles what is not compiled yet
        self._replay, self._logits = capture_graph(lambda: runner.compute(vectors, layout), runner.device, pool)

    def _unused(self, chunks: Sequence[Chunk]) -> list[int]:
        """Tokens of each of the rows left over."""
        rows = self._rows - len(chunks)
        if self._decodes:
            return [1] * rows
        return [self._num_tokens - sum(chunk.count for chunk in chunks), *[0] * (rows - 1)]

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the step has few enough sequences, tokens and context, with a row to spare for tokens left over."""
        if self._decodes:
            return len(chunks) <= self._rows
        tokens, longest = sum(chunk.count for chunk in chunks), max(chunk.first + chunk.count for chunk in chunks)
        return len(chunks) < self._rows and tokens <= self._num_tokens and longest <= self._context

    def replay(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [rows, vocabulary]; the first are those of the chunks that sample. Valid until the next replay."""
        vectors, _ = _Vectors.pack(chunks, self._block_size, self._unused(chunks))
        send(vectors, self._vectors)
        tables = _tables(chunks, self._rows)
        if not np.array_equal(tables, self._sent):  # most steps of few requests need no new block
            self._tables[:, : tables.shape[1]] = to_device(tables, self._tables.device)
            self._sent = tables
        self._replay()
        return self._logits


def capture_graph(compute: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """A function that computes again into the tensor beside it, which a CUDA graph does without the host."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = compute()
    return graph.replay, out


def _pinned_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
