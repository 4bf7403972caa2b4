"""Keys and values of the tokens seen so far: one preallocated block for the whole batch, one row a request."""

import torch
from torch import Tensor

from rowint8.baseline_engine.config import ModelConfig


class KvCache:
    """keys and values, each [layers, rows, kv heads, length, head_dim].

    Position p of a request stands at index p of its row. The cache starts as zeros: what a mask hides is multiplied by
    zero, which must not meet a NaN.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values
        self.layers = list(zip(keys.unbind(0), values.unbind(0), strict=True))
        self.rows = torch.arange(keys.shape[1], device=keys.device)[:, None]

    @classmethod
    def allocate(
        cls, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> "KvCache":
        """2 * layers * rows * kv heads * length * head_dim elements."""
        shape = (config.num_layers, rows, config.num_kv_heads, length, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values)

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def row(self, index: int) -> "KvCache":
        """A cache of one row that shares this one's memory."""
        rows = slice(index, index + 1)
        return KvCache(self.keys[:, rows], self.values[:, rows])
