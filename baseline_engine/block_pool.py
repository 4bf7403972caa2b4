"""Which blocks of the KV cache are free, whose they are, and what full ones hold.

The cache is cut into blocks of `block_size` tokens (PagedAttention, arXiv:2309.06180). A sequence has a block
table, which grows by one block at a time, so at most one block a sequence is partly empty.

A full block never changes. Under a key that stands for all tokens up to its end it can be found again and shared:
requests with a common beginning (a system prompt, a chat so far) then compute it once. A block that nobody uses any
longer keeps its contents until it is needed for something else; the one unused for longest goes first.
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

SCRATCH_BLOCK = 0
"""Belongs to nobody: the rows that pad a captured batch write there."""


def block_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: a 128-bit hash of its tokens and of the key of the block before (b"" at the start)."""
    return blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks 1 to num_blocks - 1, each free or used by one or more sequences."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = dict.fromkeys(range(1, num_blocks))  # in the order of their release; a set that keeps order
        self._users = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """All blocks but the scratch block."""
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Appends blocks until the table has room for `num_tokens`; False, and nothing done, where too few are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = next(iter(self._free))
            del self._free[block]
            self._forget(block)
            self._users[block] = 1
            table.append(block)
        return True

    def share(self, key: bytes) -> int | None:
        """The block published under `key`, with one user more; None where there is none."""
        block = self._block_of.get(key)
        if block is not None:
            self._users[block] += 1
            self._free.pop(block, None)
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Says what a full block holds. Of two blocks with the same contents the first stays the one that is found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, table: list[int]) -> None:
        """Takes one user from each block and empties the table. A sequence's end is reused before its beginning."""
        for block in reversed(table):
            if self._users[block] == 0:
                raise ValueError(f"block {block} is released, but nobody uses it")
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
        table.clear()

    def forget_contents(self) -> None:
        """From now on nothing computed so far is found again."""
        self._key_of.clear()
        self._block_of.clear()

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless exactly the blocks in `tables` are used, by as many as hold them."""
        users = [0] * self.num_blocks
        for table in tables:
            for block in table:
                users[block] += 1
        assert users == self._users, "reference counts differ from the tables"
        assert set(self._free) == {block for block in range(1, self.num_blocks) if users[block] == 0}
        assert {key: block for block, key in self._key_of.items()} == self._block_of
