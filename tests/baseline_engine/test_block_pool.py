"""The block pool under random use: nothing leaks, nothing is used twice, what is found is what was published."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rowint8.baseline_engine.block_pool import SCRATCH_BLOCK, BlockPool, block_key

NUM_BLOCKS, BLOCK_SIZE = 9, 4


class PoolMachine(RuleBasedStateMachine):
    """Sequences that grow, share and end, beside a plain model of what each block holds."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @rule(tokens=st.integers(1, 40))
    def begin(self, tokens):
        self.grow_table([], tokens, new=True)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.integers(1, 20))
    def grow(self, data, tokens):
        table = data.draw(st.sampled_from(self.tables))
        self.grow_table(table, len(table) * BLOCK_SIZE + tokens, new=False)

    def grow_table(self, table, tokens, new):
        before, free = list(table), self.pool.num_free
        needed = self.pool.blocks_for(tokens) - len(table)
        assert self.pool.grow(table, tokens) == (needed <= free)
        if needed > free:
            assert (table, self.pool.num_free) == (before, free)
            return
        taken = table[len(before) :]
        assert len(taken) == max(0, needed)
        assert SCRATCH_BLOCK not in taken
        assert not set(taken) & {block for other in self.tables if other is not table for block in other}
        for block in taken:
            self.contents.pop(block, None)
        if new:
            self.tables.append(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.integers(0, 5))
    def publish(self, data, name):
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        key = block_key(b"", [name])
        block = table[-1]
        self.pool.publish(block, key)
        if block not in self.contents and key not in self.contents.values():
            self.contents[block] = key

    @rule(name=st.integers(0, 5))
    def share(self, name):
        key = block_key(b"", [name])
        expected = next((block for block, held in self.contents.items() if held == key), None)
        assert self.pool.share(key) == expected
        if expected is not None:
            self.tables.append([expected])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        assert table == []

    @rule()
    def forget(self):
        self.pool.forget_contents()
        self.contents.clear()

    @invariant()
    def every_block_is_accounted_for(self):
        self.pool.check(self.tables)
        used = {block for table in self.tables for block in table}
        assert self.pool.num_free == self.pool.num_usable - len(used)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_block_released_twice_is_an_error():
    pool, table = BlockPool(4, 4), []
    pool.grow(table, 4)
    copy = list(table)
    pool.release(table)
    with pytest.raises(ValueError, match="is released, but nobody uses it"):
        pool.release(copy)


def test_what_was_unused_for_longest_is_overwritten_first_and_ends_before_beginnings():
    pool, first, second = BlockPool(5, 1), [], []
    pool.grow(first, 2)
    pool.grow(second, 2)
    blocks = first + second
    pool.release(first)
    pool.release(second)
    lost, table = [], []
    for size in range(1, 5):
        pool.grow(table, size)
        overwritten = (set(table) - set(lost)).pop()
        lost.append(overwritten)
    assert lost == [blocks[1], blocks[0], blocks[3], blocks[2]]


def test_keys_tell_tokens_and_what_came_before_apart():
    keys = {
        block_key(before, tokens)
        for before in (b"", block_key(b"", [1]), block_key(b"", [2]))
        for tokens in ([1, 2], [2, 1], [12], [1, 2, 0])
    }
    assert len(keys) == 12
    assert block_key(b"", [1, 2]) == block_key(b"", (1, 2))
