"""Keys and values of the tokens seen so far, in blocks; which block is whose, `block_pool` knows."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.baseline_engine.transfer import to_device


class KvCache:
    """[2, layers, blocks, block_size, kv heads, head_dim]: keys, then values.

    It starts as zeros, and so does every block of a sequence: what a mask hides is multiplied by zero, which must not
    meet a NaN that an earlier user left.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        shape = (2, config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks, self.block_size = num_blocks, block_size
        flat = self.data.flatten(2, 3)
        self.slots: list[tuple[Tensor, Tensor]] = list(zip(flat[0].unbind(0), flat[1].unbind(0), strict=True))
        """The same memory without blocks, [blocks * block_size, kv heads, head_dim] each, for writing."""
        self.layers: list[tuple[Tensor, Tensor]] = list(
            zip(self.data[0].unbind(0), self.data[1].unbind(0), strict=True)
        )

    def clear(self, blocks: Sequence[int]) -> None:
        """Makes the blocks zeros."""
        self.data.index_fill_(2, to_device(blocks, self.data.device, np.int64), 0)

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
