"""Which tokens of which requests the model computes next.

Continuous batching (Orca, OSDI 2022): requests enter and leave between any two steps. A step computes at most
`max_batch_tokens` tokens. Requests that run come first, oldest first: each in its decode phase has one to compute. What
is left of the budget goes to prompts, in pieces if need be (chunked prefill, arXiv:2308.16369), so a long prompt never
holds up the others for longer than one step.

When the blocks run out, the youngest running request is preempted: it gives its blocks back, keeps its tokens, and
waits at the front of the queue to have them computed again. The oldest is never held up, so every request ends.
"""

from collections import deque
from typing import NamedTuple

from rowint8.baseline_engine.block_pool import BlockPool
from rowint8.baseline_engine.request import Request


class Chunk(NamedTuple):
    """Consecutive tokens of one request that a step computes."""

    request: Request
    first: int
    count: int
    samples: bool
    """Whether its last token is the newest of the request, after which the next is sampled."""


class Scheduler:
    """Requests that wait and requests that run; `schedule`, run the chunks, then `commit` them."""

    def __init__(self, pool: BlockPool, max_seqs: int, max_batch_tokens: int, prefix_caching: bool = True):
        self.pool, self.prefix_caching = pool, prefix_caching
        self.max_seqs, self.max_batch_tokens = max_seqs, max_batch_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """Oldest first."""
        self.num_preemptions = 0
        self.num_shared_tokens = 0
        """Prompt tokens that were found in the cache."""

    @property
    def requests(self) -> list[Request]:
        """All that have not ended. One on its way from one list to the other stands in both for a moment."""
        return list(dict.fromkeys([*self.running, *self.waiting]))

    @property
    def num_slots(self) -> int:
        """Places for a token in the blocks that requests hold."""
        return sum(len(request.blocks) for request in self.running) * self.pool.block_size

    @property
    def num_filled(self) -> int:
        """Tokens in those, once the steps scheduled so far are computed."""
        return sum(request.num_computed for request in self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def reset(self) -> None:
        """Starts anew without requests or contents of the cache, whatever a step that was broken off left behind."""
        for request in self.requests:
            request.blocks = []
        self.pool = BlockPool(self.pool.num_blocks, self.pool.block_size)
        self.waiting, self.running = deque(), []

    def finish(self, request: Request) -> None:
        """Takes the request out and its blocks back, wherever it stands."""
        self.pool.release(request.blocks)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, with blocks for all of their tokens; empty where nothing can run."""
        preemptions = self.num_preemptions
        chunks, budget = self._schedule_running()
        if self.num_preemptions == preemptions:
            chunks += self._admit(budget)
        return chunks

    def _schedule_running(self) -> tuple[list[Chunk], int]:
        """(chunks, budget left)."""
        chunks, budget, position = [], self.max_batch_tokens, 0
        while position < len(self.running) and budget:
            request = self.running[position]
            count = min(request.num_uncomputed, budget)
            if count and self._make_room(request, request.num_computed + count):
                chunks.append(_chunk(request, count))
                budget -= count
            position += 1
        return chunks, budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempts the youngest until there are blocks for the request; False where it was itself the youngest."""
        while not self.pool.grow(request.blocks, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Sends the youngest back to wait."""
        self.pool.release(request.blocks)
        request.num_computed = request.num_published = 0
        self.waiting.appendleft(request)
        self.running.pop()
        self.num_preemptions += 1

    def _admit(self, budget: int) -> list[Chunk]:
        """Lets waiting requests in, in order, as long as budget, seats and blocks suffice."""
        chunks = []
        while self.waiting and budget and len(self.running) < self.max_seqs:
            request = self.waiting[0]
            self._share_prefix(request)
            count = min(request.num_uncomputed, budget)
            # Room for all of it, so that what its first chunks compute is not preempted before the last.
            missing = self.pool.blocks_for(request.num_tokens) - len(request.blocks)
            if missing > self.pool.num_free or not self.pool.grow(request.blocks, request.num_computed + count):
                self.pool.release(request.blocks)
                request.num_computed = request.num_published = 0
                break
            self.running.append(request)
            self.waiting.popleft()
            self.num_shared_tokens += request.num_computed
            chunks.append(_chunk(request, count))
            budget -= count
        return chunks

    def _share_prefix(self, request: Request) -> None:
        """Takes over what the cache holds of the request's beginning; its last token must yield logits, so not that."""
        size = self.pool.block_size
        most = (len(request.tokens) - 1) // size if self.prefix_caching else 0
        while len(request.blocks) < most:
            block = self.pool.share(request.key(len(request.blocks), size))
            if block is None:
                break
            request.blocks.append(block)
        request.num_published = len(request.blocks)
        request.num_computed = len(request.blocks) * size

    def commit(self, chunks: list[Chunk]) -> None:
        """Notes that the chunks are computed, or queued on the device, where later steps find them done."""
        for request, _, count, samples in chunks:
            request.num_computed += count
            request.num_pending += samples
            if self.prefix_caching:
                self._publish(request)

    def _publish(self, request: Request) -> None:
        size = self.pool.block_size
        full = min(request.num_computed, len(request.tokens)) // size
        while request.num_published < full:
            index = request.num_published
            self.pool.publish(request.blocks[index], request.key(index, size))
            request.num_published += 1


def _chunk(request: Request, count: int) -> Chunk:
    return Chunk(request, request.num_computed, count, request.num_computed + count == request.num_tokens)
