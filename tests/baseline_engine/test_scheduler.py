"""The scheduler under random loads: budgets hold, memory returns, order is fair, every request ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rowint8.baseline_engine.block_pool import BlockPool
from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.request import Request
from rowint8.baseline_engine.sampler import SamplingState
from rowint8.baseline_engine.scheduler import Scheduler

BLOCKS, BLOCK_SIZE, MAX_SEQS, BUDGET = 12, 3, 4, 8
CONTEXT = BLOCKS * BLOCK_SIZE


def request_of(prompt: int, output: int, first_token: int = 0, index: int = 0) -> Request:
    tokens = list(range(first_token, first_token + prompt))
    return Request(index, tokens, prompt, SamplingState(SamplingParams()), output, frozenset(), None, 0.0)


def new_scheduler(**changes) -> Scheduler:
    limits = {"max_seqs": MAX_SEQS, "max_batch_tokens": BUDGET} | changes
    return Scheduler(BlockPool(BLOCKS + 1, BLOCK_SIZE), **limits)


def run_step(scheduler: Scheduler, token: int = 7):
    """Schedules and computes a step at once; every sampled token is `token`."""
    chunks = scheduler.schedule()
    scheduler.commit(chunks)
    for chunk in chunks:
        if chunk.samples:
            chunk.request.append(token, 0.0)
            if chunk.request.finish_reason:
                scheduler.finish(chunk.request)
    return chunks


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are aborted, and stop early; steps are recorded at once or one step late."""

    def __init__(self):
        super().__init__()
        self.scheduler = new_scheduler()
        self.requests: list[Request] = []
        self.computed: dict[int, int] = {}
        self.in_flight: list = []

    @rule(prompt=st.integers(1, 30), output=st.integers(1, 12), first_token=st.integers(0, 2))
    def add(self, prompt, output, first_token):
        request = request_of(prompt, min(output, CONTEXT - prompt), first_token, len(self.requests))
        self.requests.append(request)
        self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.requests))
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self.scheduler.finish(request)

    @rule(stop=st.booleans(), late=st.booleans())
    def step(self, stop, late):
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        runnable = oldest is not None and oldest.num_uncomputed > 0
        waiting = len(self.scheduler.waiting) > 0
        chunks = self.scheduler.schedule()
        self.check_chunks(chunks)
        if runnable:
            assert chunks[0].request is oldest, "the oldest is never held up"
        elif waiting and oldest is None:
            assert chunks, "an empty engine always lets someone in"
        self.scheduler.commit(chunks)
        late_chunks, self.in_flight = self.in_flight, chunks
        self.record(late_chunks, stop)
        if not late:
            self.record(self.in_flight, stop)
            self.in_flight = []

    def check_chunks(self, chunks):
        assert sum(chunk.count for chunk in chunks) <= BUDGET
        assert len({id(chunk.request) for chunk in chunks}) == len(chunks)
        for request, first, count, samples in chunks:
            assert count >= 1
            assert first == request.num_computed
            assert samples == (first + count == request.num_tokens)
            assert len(request.blocks) * BLOCK_SIZE >= first + count
            assert first + count <= len(request.tokens) + request.num_pending
            assert request.finish_reason is None

    def record(self, chunks, stop):
        for chunk in chunks:
            if chunk.samples and chunk.request.finish_reason is None:
                chunk.request.append(len(chunk.request.tokens) % 3, 0.0)
                if stop and len(chunk.request.tokens) % 5 == 0:
                    chunk.request.finish_reason = "stop"
                if chunk.request.finish_reason:
                    self.scheduler.finish(chunk.request)

    @invariant()
    def memory_is_accounted_for(self):
        scheduler = self.scheduler
        scheduler.pool.check([request.blocks for request in self.requests])
        assert len(scheduler.running) <= MAX_SEQS
        for request in [*scheduler.waiting, *[r for r in self.requests if r.finish_reason]]:
            assert request.blocks == []
        for request in scheduler.running:
            assert len(request.blocks) * BLOCK_SIZE >= request.num_computed

    def teardown(self):
        """Every request ends, in a bounded number of steps."""
        left = sum(2 * CONTEXT for request in self.requests if request.finish_reason is None)
        steps = 0
        while self.scheduler.waiting or self.scheduler.running or self.in_flight:
            self.step(stop=False, late=False)
            steps += 1
            assert steps <= left + 1
        assert all(request.finish_reason for request in self.requests)
        assert all(
            len(request.tokens) - request.num_prompt == request.max_tokens
            for request in self.requests
            if request.finish_reason == "length"
        )
        self.scheduler.pool.check([])


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


@given(prompts=st.lists(st.integers(1, 30), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_first_come_first_admitted(prompts):
    scheduler, admitted = new_scheduler(), []
    requests = [request_of(length, 3, index=index) for index, length in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting or scheduler.running:
        for chunk in run_step(scheduler):
            if chunk.request not in admitted:
                admitted.append(chunk.request)
    assert admitted == requests


def test_decodes_go_before_prompts_and_prompts_take_what_is_left():
    scheduler = new_scheduler(max_batch_tokens=10)
    first, second = request_of(4, 8, 0), request_of(20, 8, 50)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(second)
    shares = [[(chunk.request is first, chunk.count, chunk.samples) for chunk in run_step(scheduler)] for _ in range(3)]
    assert shares[0] == [(True, 1, True), (False, 9, False)]
    assert shares[1] == [(True, 1, True), (False, 9, False)]
    assert shares[2] == [(True, 1, True), (False, 2, True)]


def test_the_youngest_is_preempted_and_keeps_its_tokens():
    scheduler = new_scheduler(max_batch_tokens=100)
    old, young = request_of(18, 18, 0), request_of(15, 10, 50)
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.num_preemptions:
        run_step(scheduler)
    kept = list(young.tokens)
    assert len(kept) > 15
    assert (list(scheduler.waiting), scheduler.running, young.num_computed, young.blocks) == ([young], [old], 0, [])
    while scheduler.waiting or scheduler.running:
        run_step(scheduler)
    assert young.tokens[: len(kept)] == kept
    assert (len(old.output_ids), len(young.output_ids)) == (18, 10)


def test_a_pending_last_token_is_not_computed_on():
    scheduler = new_scheduler()
    request = request_of(3, 1)
    scheduler.add(request)
    chunks = scheduler.schedule()
    scheduler.commit(chunks)
    assert [chunk.samples for chunk in chunks] == [True]
    assert scheduler.schedule() == [], "its one token is on the way"


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_prefixes_are_shared_only_when_asked(prefix_caching):
    scheduler = new_scheduler(prefix_caching=prefix_caching, max_batch_tokens=100)
    for _ in range(2):
        scheduler.add(request_of(10, 1))
        run_step(scheduler)
    assert scheduler.num_shared_tokens == (9 if prefix_caching else 0)
