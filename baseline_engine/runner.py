"""Runs the model over a step's chunks: packs them into tensors, replays a CUDA graph where one fits, samples.

    host                                          device
    chunks -> numpy arrays -> pinned memory  ->  tokens, positions, slots, lengths, tables
                                                  embedding, layers, logits      (one graph where one fits)
                                                  sampler -> `sampled`, which the next step's tokens may come from
    StepResult.read  <-------------------------   copy of the tokens, awaited when they are needed

`launch` only queues work on a GPU. A step may therefore be launched before the tokens of the one before it have been
read: they are then taken from `sampled` on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowint8.baseline_engine.attention import AttentionBackend, Layout
from rowint8.baseline_engine.batch import Batch, block_tables, pack
from rowint8.baseline_engine.block_pool import SCRATCH_BLOCK
from rowint8.baseline_engine.graphs import Capture, DecodeGraph, PromptGraph, StepGraph
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.model import Decoder
from rowint8.baseline_engine.request import Request
from rowint8.baseline_engine.sampler import Sampled, TokenLogprobs, sample
from rowint8.baseline_engine.scheduler import Chunk
from rowint8.baseline_engine.transfer import to_device


@dataclass
class StepResult:
    """The tokens that a step samples, on their way to the host."""

    requests: list[Request]
    """In the order of the rows."""
    _sampled: Sampled
    _ready: torch.cuda.Event | None

    def read(self) -> list[tuple[Request, int, TokenLogprobs | None]]:
        """Waits for the device; (request, token, logprobs where the request asked for them) for each row.

        The token is `sampler.NOT_FINITE` where it would have been chosen from NaN or infinite logits.
        """
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


class ModelRunner:
    """The model, its cache, and what is kept on the device between steps."""

    def __init__(self, model: Decoder, cache: KvCache, attention: AttentionBackend, max_seqs: int, context: int):
        self.model, self.cache, self.attention = model, cache, attention
        self.device, self.max_seqs, self.context = model.weight_format.device, max_seqs, context
        self.sampled = torch.zeros(max_seqs, dtype=torch.int64, device=self.device)
        """Tokens of the step launched last, one row a request that sampled."""
        self.decode_graphs: list[DecodeGraph] = []
        """By the number of sequences, the smallest first."""
        self.prompt_graphs: list[PromptGraph] = []
        """By the number of tokens, the smallest first."""

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> StepResult:
        """Queues the step; its requests' `sampled_row` is set."""
        requests = [chunk.request for chunk in chunks if chunk.samples]
        self._clear_begun_blocks(chunks)
        graph = self._graph_for(chunks)
        logits = graph.replay(chunks) if graph else self.compute(*self._inputs(chunks))
        if not requests:
            return StepResult([], Sampled(torch.empty(0, dtype=torch.int64), None, None), None)
        logits = logits[: len(requests)]
        chosen = sample(logits, [request.sampling for request in requests], [request.tokens for request in requests])
        self.sampled[: len(requests)] = chosen.tokens.clamp(min=0)
        for row, request in enumerate(requests):
            request.sampled_row = row
        return self._to_host(requests, chosen)

    def _graph_for(self, chunks: Sequence[Chunk]) -> StepGraph | None:
        decodes = all(chunk.count == 1 and chunk.samples for chunk in chunks)
        graphs = self.decode_graphs if decodes else self.prompt_graphs
        return next((graph for graph in graphs if graph.fits(chunks)), None)

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states [T, hidden] of all tokens of a step that samples nothing; see `scoring`."""
        self._clear_begun_blocks(chunks)
        return self._hidden(*self._inputs(chunks))

    def _clear_begun_blocks(self, chunks: Sequence[Chunk]) -> None:
        """Those that the step begins and does not fill, one a sequence at most."""
        size, begun = self.cache.block_size, []
        for request, first, count, _ in chunks:
            block, used = divmod(first + count, size)
            if used and block * size >= first:
                begun.append(request.blocks[block])
        if begun:
            self.cache.clear(begun)

    def _inputs(self, chunks: Sequence[Chunk]) -> tuple[Batch, Layout]:
        packed, sizes = pack(chunks, self.cache.block_size)
        batch = Batch(*to_device(packed, self.device).split(sizes))
        lengths = [chunk.count for chunk in chunks]
        ends = [chunk.first + chunk.count for chunk in chunks]
        tables = to_device(block_tables(chunks, len(chunks)), self.device)
        return batch, Layout(batch.query_start, batch.seq_lens, tables, lengths, ends)

    def compute(self, batch: Batch, layout: Layout) -> Tensor:
        """Logits [sampling sequences, vocabulary] of a step whose numbers are on the device."""
        hidden = self._hidden(batch, layout)
        if len(batch.logit_rows) < len(hidden):
            hidden = hidden[batch.logit_rows]
        return self.model.logits(hidden)

    def _hidden(self, batch: Batch, layout: Layout) -> Tensor:
        sources = batch.sources.long()
        tokens = torch.where(sources < 0, batch.tokens.long(), self.sampled[sources.clamp(min=0)])
        attend = self.attention.plan(layout)
        return self.model(tokens, batch.positions, batch.slots.long(), self.cache, attend)

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
        packed, sizes = pack([], self.cache.block_size, [num_tokens])
        batch = Batch(*to_device(packed, self.device).split(sizes))
        tables = torch.full((1, blocks), SCRATCH_BLOCK, dtype=torch.int32, device=self.device)
        self.compute(batch, Layout(batch.query_start, batch.seq_lens, tables, [num_tokens], [num_tokens]))

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], prompt_sizes: Sequence[int]) -> None:
        """Captures a decode graph for each number of sequences, and a graph of prompts for each number of tokens where
        the attention can; they share one memory pool, the largest first."""
        capture = Capture(self.compute, self.device, self.cache.block_size, torch.cuda.graph_pool_handle())
        sizes, prompt_sizes = sorted(sizes)[::-1], sorted(prompt_sizes)[::-1]
        if self.attention.captures_prompts:
            prompts = [PromptGraph(capture, size, self.max_seqs, self.context) for size in prompt_sizes]
            self.prompt_graphs = prompts[::-1]
        self.decode_graphs = [DecodeGraph(capture, size, self.context) for size in sizes][::-1]


def _pinned_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
