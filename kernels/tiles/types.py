"""What a tile is: how a kernel cuts a product into programs. The type of a tile says which kernel runs it.

A tile that no kernel can run is not made: each type checks its fields (pydantic's ValidationError, a ValueError).
"""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass


def _power_of_two(size: int) -> int:
    if size & (size - 1):
        raise ValueError("must be a power of two")
    return size


Count = Annotated[int, Field(strict=True, gt=0)]
Size = Annotated[Count, AfterValidator(_power_of_two)]
Flag = Annotated[bool, Field(strict=True)]
_CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CONFIG)
class TritonTile:
    """A variant of the kernels in `triton_matmul`. block_m = 1 is the one on CUDA cores, others are on tensor cores."""

    block_m: Size
    """Tokens per program."""
    block_n: Size
    """Weight rows per program (for SwiGLU: gate and up rows together)."""
    block_k: Size
    num_warps: Size
    num_stages: Count
    group: Count = 8
    """Row blocks of the weight that run together, for reuse in L2."""
    slices: Size = 1
    """Slices of a block of K that go to different warps."""
    overlaps: Flag = False
    """Whether the kernel is set up while the one in front of it still runs, where the card can do so."""

    def __post_init__(self) -> None:
        if self.block_m == 1 and self.slices != 1:
            raise ValueError("the kernel for one token has no slices")
        if self.block_m > 1 and min(self.block_m, self.block_n, self.block_k // self.slices) < 16:
            raise ValueError("tensor cores take at least 16 tokens, 16 rows and, in each slice, 16 of K")

    def serves(self, op: str) -> bool:
        """SwiGLU has its rows in pairs. INT8 tokens are multiplied on tensor cores, in whole blocks of K."""
        if op.endswith("_int8"):
            return self.block_m > 1 and self.slices == 1
        return op == "linear" or self.block_n > 1

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the pipeline of the tensor-core kernel holds for activations of `itemsize` bytes."""
        return self.num_stages * self.block_k * (self.block_n + self.block_m * itemsize)


MOST_FEW_TOKENS = 8


@dataclass(frozen=True, config=_CONFIG)
class FewTokensTile:
    """A variant of the kernel for 2 to MOST_FEW_TOKENS tokens, which has 16 weight rows per program."""

    warps: Size
    block_k: Size
    """K of all warps at a time."""

    def __post_init__(self) -> None:
        if self.warps > 8 or self.block_k // self.warps not in (128, 256):
            raise ValueError("accepted are 1 to 8 warps with 128 or 256 of K each")

    def serves(self, op: str) -> bool:
        """Any operator of 16-bit activations."""
        return not op.endswith("_int8")


CONSUMER_ROWS = 64
"""Weight rows of one consumer of the Hopper kernel: the height of a wgmma."""
_HOPPER_RING_BYTES = 221 * 1024
"""Shared memory for stages; the rest of a program's 227 KiB holds barriers and the epilogue's scratch."""
_HOPPER_SIZES = (
    (16, 256, 1, 2, 0),
    (16, 256, 2, 1, 0),
    (32, 256, 2, 1, 0),
    (32, 256, 2, 1, 16),
    (32, 128, 1, 2, 0),
    (32, 128, 1, 2, 8),
    (32, 128, 1, 2, 16),
    (64, 128, 1, 2, 0),
    (64, 128, 1, 2, 8),
    (64, 128, 1, 2, 16),
    (64, 128, 1, 2, 32),
    (64, 64, 1, 2, 64),
    (64, 64, 4, 1, 0),
    (64, 64, 4, 1, 16),
    (64, 64, 4, 1, 32),
    (128, 64, 1, 2, 16),
    (128, 64, 1, 2, 32),
    (128, 64, 1, 2, 64),
    (128, 128, 2, 1, 0),
    (128, 128, 2, 1, 16),
    (128, 128, 2, 1, 32),
    (128, 128, 2, 1, 64),
    (128, 64, 2, 1, 128),
    (128, 64, 3, 1, 16),
    (128, 64, 3, 1, 64),
    (128, 64, 4, 1, 0),
    (256, 64, 2, 1, 0),
)
"""(block_m, block_k, across, deep, tail) of all variants of the Hopper kernel for 16-bit activations."""
_INT8_SIZES = (
    (16, 256, 1, 2, 0),
    (32, 128, 1, 2, 0),
    (64, 128, 1, 2, 0),
    (64, 128, 1, 2, 16),
    (64, 128, 1, 2, 32),
    (64, 256, 2, 1, 0),
    (64, 128, 2, 1, 32),
    (128, 128, 2, 1, 0),
    (128, 128, 2, 1, 16),
    (128, 128, 2, 1, 32),
    (128, 128, 2, 1, 64),
    (128, 128, 3, 1, 0),
    (128, 128, 3, 1, 64),
    (128, 128, 2, 1, 128),
)
"""Likewise for INT8 tokens."""


@dataclass(frozen=True, config=_CONFIG)
class HopperTile:
    """A variant of the Hopper kernel."""

    block_m: Size
    """Tokens per program, besides `tail`."""
    block_k: Size
    across: Count
    """Consumers side by side, each with CONSUMER_ROWS weight rows (for SwiGLU half of them are gate rows)."""
    deep: Count
    """Consumers one behind another, each with a `block_k` of every slice of K."""
    tail: Annotated[int, Field(strict=True, ge=0), AfterValidator(_power_of_two)] = 0
    """More tokens per program, with sums of their own: the compiler's sizes are powers of two, a tile's width need not
    be one. Both parts are multiplied by the same widened weights."""
    shared: Flag = False
    """Whether programs share tiles along K (stream-K), so that each multiplies as much as any other."""
    group: Count = 8
    """Row blocks of the weight that run together, for reuse in L2."""
    int8: Flag = False
    """Whether tokens are INT8, too. Such a tile is never shared: whole ones are as fast."""

    def __post_init__(self) -> None:
        accepted = _INT8_SIZES if self.int8 else _HOPPER_SIZES
        if self.sizes not in accepted:
            raise ValueError(f"(block_m, block_k, across, deep, tail) is {self.sizes}; accepted are {accepted}")
        if self.shared and not self.can_be_shared:
            raise ValueError("neither four consumers with 128 tokens each nor INT8 tokens take the sums of others")

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(block_m, block_k, across, deep, tail): all but what may be chosen freely."""
        return self.block_m, self.block_k, self.across, self.deep, self.tail

    @property
    def itemsize(self) -> int:
        """Bytes of one activation."""
        return 2 - self.int8

    @property
    def width(self) -> int:
        """All tokens per program."""
        return self.block_m + self.tail

    @property
    def can_be_shared(self) -> bool:
        """Whether a linear layer has registers left for taking the sums of other programs; SwiGLU never has. With INT8
        tokens whole tiles are as fast."""
        return not self.int8 and (self.across * self.deep < 4 or self.width <= 64)

    def serves(self, op: str) -> bool:
        """SwiGLU takes whole tiles only, and INT8 tokens have tiles of their own."""
        return self.int8 == op.endswith("_int8") and (op == "linear" or not self.shared)

    @property
    def rows(self) -> int:
        """Weight rows per program."""
        return self.across * CONSUMER_ROWS

    def count(self, m: int, n: int) -> int:
        """Tiles that a product of m tokens and n weight rows has."""
        return -(-m // self.width) * -(-n // self.rows)

    @property
    def stages(self) -> int:
        """Slices of K in flight, as many as shared memory holds."""
        handed_over = 4 * (self.deep - 1) * self.rows * self.width
        slice_bytes = self.deep * self.block_k * (self.rows + self.itemsize * self.width)
        return min(10, (_HOPPER_RING_BYTES - handed_over) // slice_bytes)


HOPPER_TILES = tuple(HopperTile(*sizes) for sizes in _HOPPER_SIZES)
INT8_HOPPER_TILES = tuple(HopperTile(*sizes, int8=True) for sizes in _INT8_SIZES)
Tile = TritonTile | FewTokensTile | HopperTile
