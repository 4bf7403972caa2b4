"""Attention of a flat batch over the paged cache. The one place that knows which library computes it.

    backend   where                                         how
    flash3    CUDA of compute capability 9, bf16 or fp16,   FlashAttention 3 (arXiv:2407.08608) as vLLM ships it, which
              vLLM's CUDA build installed                   reads the block tables itself; one call for any batch
    torch     everywhere                                    torch's SDPA over keys and values gathered from the blocks

`choose` takes the first that applies, once, when the engine starts; the choice is `Engine.attention_name`. Both can be
captured in a CUDA graph for decode steps: lengths and tables are read on the device. There torch reads as
many keys a row as the context has at most. flash3 also serves captured prompts.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rowint8.baseline_engine.model import Attend
from rowint8.baseline_engine.model_config import ModelConfig

_GRAPH_SPLITS = 32
"""Most pieces into which FlashAttention cuts a row's keys in a captured decode step, which cannot see their number."""


class Layout(NamedTuple):
    """Which tokens of a flat batch belong to which of its B sequences, and where the keys of those are."""

    query_start: Tensor
    """int32 [B + 1]: sequence b has the tokens query_start[b] to query_start[b + 1] - 1, the last of its context."""
    seq_lens: Tensor
    """int32 [B]: tokens of the context, those of this step included."""
    block_tables: Tensor
    """int32 [B, W]: the blocks of each context, in order; what exceeds it is not looked at."""
    query_lens: list[int]
    """As in query_start, on the host."""
    host_seq_lens: list[int]
    """seq_lens on the host; in a captured graph, the most they can become."""
    captured: bool = False


class AttentionBackend(Protocol):
    """Attention of one kind of model on one device."""

    name: str
    captures_prompts: bool
    """Whether a captured graph also serves steps in which sequences have several tokens: their numbers, too, are then
    read on the device."""

    def plan(self, layout: Layout) -> Attend:
        """Prepares what all layers of one step share; returns the function that each layer calls."""
        ...


def choose(config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int) -> AttentionBackend:
    """The backend for this model on this device (see above)."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        flash = load_flash3() if torch.cuda.get_device_capability(device)[0] == 9 else None
        if flash is not None and config.head_dim <= 256 and config.head_dim % 8 == 0:
            return Flash3Attention(flash, config, dtype, block_size)
    return TorchAttention(config.sliding_window, dtype, block_size)


def load_flash3() -> ModuleType | None:
    """vLLM's FlashAttention module without vLLM, whose import patches torch; None where it is not installed."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return None
    package = ModuleType("vllm_flash_attn")
    package.__path__ = [str(Path(vllm.origin).with_name("vllm_flash_attn"))]
    sys.modules.setdefault(package.__name__, package)
    try:
        module = importlib.import_module("vllm_flash_attn.flash_attn_interface")
    except ImportError:
        return None
    return module if getattr(module, "FA3_AVAILABLE", False) else None


class Flash3Attention:
    """One varlen call over the block tables; how the work is split over the GPU is planned once for all layers."""

    name = "flash3 (FlashAttention 3 of the installed vLLM)"
    captures_prompts = True

    def __init__(self, flash: ModuleType, config: ModelConfig, dtype: torch.dtype, block_size: int):
        self._flash, self._config, self._dtype, self._block_size = flash, config, dtype, block_size
        self._window = (-1, -1) if config.sliding_window is None else (config.sliding_window - 1, 0)

    def plan(self, layout: Layout) -> Attend:
        queries = max(layout.query_lens)
        splits = 0 if not layout.captured else _GRAPH_SPLITS if queries == 1 else 1
        shared: dict[str, Any] = dict(
            max_seqlen_q=queries,
            max_seqlen_k=max(layout.host_seq_lens),
            cu_seqlens_q=layout.query_start,
            causal=True,
            window_size=self._window,
            num_splits=splits,
        )
        metadata = self._flash.get_scheduler_metadata(
            batch_size=len(layout.query_lens),
            num_heads_q=self._config.num_heads,
            num_heads_kv=self._config.num_kv_heads,
            headdim=self._config.head_dim,
            cache_seqlens=layout.seq_lens,
            qkv_dtype=self._dtype,
            page_size=self._block_size,
            **shared,
        )
        shared |= dict(seqused_k=layout.seq_lens, block_table=layout.block_tables, scheduler_metadata=metadata)

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self._flash.flash_attn_varlen_func(queries, keys, values, fa_version=3, **shared)

        return attend


class TorchAttention:
    """Sequences with one new token together, padded to the longest and masked; each other sequence by itself."""

    name = "torch (SDPA over gathered blocks)"
    captures_prompts = False

    def __init__(self, window: int | None, dtype: torch.dtype, block_size: int):
        self._window, self._dtype, self._block_size = window, dtype, block_size

    def plan(self, layout: Layout) -> Attend:
        lens = layout.query_lens
        decodes = next((row for row, length in enumerate(lens) if length > 1), len(lens))
        parts = [self._plan_decodes(layout, decodes)] if decodes else []
        parts += [self._plan_prefill(layout, row) for row in range(decodes, len(lens))]
        sizes = ([decodes] if decodes else []) + lens[decodes:]
        if len(parts) == 1:
            return parts[0]

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            pieces = zip(parts, queries.split(sizes), strict=True)
            return torch.cat([part(piece, keys, values) for part, piece in pieces])

        return attend

    def _plan_decodes(self, layout: Layout, rows: int) -> Attend:
        """The first `rows` sequences, one query each."""
        longest = max(layout.host_seq_lens[:rows])
        tables = layout.block_tables[:rows, : -(-longest // self._block_size)]
        lengths = layout.seq_lens[:rows, None]
        places = torch.arange(tables.shape[1] * self._block_size, device=tables.device)
        mask = self._additive(_visible(lengths - 1, places, self._window))[:, None, None]

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            # The query heads that share a key head are passed as so many queries of that head: each key is read once.
            grouped = queries.view(rows, keys.shape[2], -1, queries.shape[-1])
            k, v = (_gather(cache, tables).transpose(1, 2) for cache in (keys, values))
            return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(queries.shape)

        return attend

    def _plan_prefill(self, layout: Layout, row: int) -> Attend:
        """One sequence with several queries, which may continue a context that is in the cache already."""
        queries_len, length = layout.query_lens[row], layout.host_seq_lens[row]
        table = layout.block_tables[row : row + 1, : -(-length // self._block_size)]
        options: dict[str, Any] = {"is_causal": True}
        if queries_len < length or (self._window or length) < length:
            places = torch.arange(length, device=table.device)
            options = {
                "attn_mask": self._additive(_visible(places[length - queries_len :, None], places, self._window))
            }

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            k, v = (_gather(cache, table)[0, :length].transpose(0, 1) for cache in (keys, values))
            out = F.scaled_dot_product_attention(
                queries.transpose(0, 1)[None], k[None], v[None], enable_gqa=True, **options
            )
            return out[0].transpose(0, 1)

        return attend

    def _additive(self, visible: Tensor) -> Tensor:
        return torch.zeros_like(visible, dtype=self._dtype).masked_fill(~visible, -torch.inf)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Which key positions a query position sees (broadcast): its own, and those before it within the window."""
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _gather(cache: Tensor, tables: Tensor) -> Tensor:
    """[blocks, block_size, kv heads, D] by tables [B, W] -> [B, W * block_size, kv heads, D]."""
    return cache.index_select(0, tables.flatten()).view(len(tables), -1, *cache.shape[2:])
