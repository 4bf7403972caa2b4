"""Attention over paged keys and values against its definition, for batches of every composition."""

import pytest
import torch

from rowint8.baseline_engine import attention
from rowint8.baseline_engine.attention import Layout, TorchAttention
from rowint8.baseline_engine.model_config import ModelConfig

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 16, 4
BATCHES = {
    "one decode": [(1, 9)],
    "decodes": [(1, 9), (1, 1), (1, 16)],
    "a whole prompt": [(13, 13)],
    "a later piece of a prompt": [(5, 13)],
    "all of it": [(1, 9), (1, 5), (7, 7), (3, 11), (1, 6)],
}


def paged(contexts, dtype, device):
    """Keys and values [blocks, BLOCK, KV_HEADS, SIZE] of contexts scattered over random blocks, and their tables."""
    counts = [-(-length // BLOCK) for length in contexts]
    order = (torch.randperm(sum(counts)) + 1).split(counts)
    keys, values = torch.randn(2, sum(counts) + 1, BLOCK, KV_HEADS, SIZE, device=device).to(dtype)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(order):
        tables[row, : len(blocks)] = blocks
    return keys, values, tables.to(device)


def by_definition(queries, keys, values, window):
    """fp64 [T, heads, D]: the last T of L tokens look at those up to themselves, `window` of them."""
    tokens, length = len(queries), len(keys)
    keys, values = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
    scores = torch.einsum("thd,lhd->htl", queries.double(), keys) / SIZE**0.5
    distance = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    weights = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, values)


def check(backend, batch, window, dtype, device, captured=False):
    torch.manual_seed(0)
    lens, contexts = zip(*batch, strict=True)
    keys, values, tables = paged(contexts, dtype, device)
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32, device=device)
    on_host = [tables.shape[1] * BLOCK] * len(batch) if captured else list(contexts)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    layout = Layout(starts, lengths, tables, list(lens), on_host, captured)
    queries = torch.randn(sum(lens), HEADS, SIZE, device=device).to(dtype)
    out = backend.plan(layout)(queries, keys, values)
    for row, part in enumerate(queries.split(lens)):
        own = [cache[tables[row].long()].flatten(0, 1)[: contexts[row]] for cache in (keys, values)]
        expected = by_definition(part, *own, window)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        found = out[int(starts[row]) : int(starts[row + 1])].double()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_torch_attention_follows_the_definition(batch, window):
    check(TorchAttention(window, torch.float32, BLOCK), batch, window, torch.float32, "cpu")


def test_torch_attention_needs_no_lengths_on_the_host_to_decode():
    check(TorchAttention(None, torch.float32, BLOCK), BATCHES["decodes"], None, torch.float32, "cpu", captured=True)


def config_of(window):
    return ModelConfig(
        vocab_size=8,
        hidden_size=HEADS * SIZE,
        intermediate_size=8,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=window,
        tie_word_embeddings=True,
        eos_token_ids=(),
        dtype=torch.bfloat16,
    )


def test_the_cpu_takes_torch():
    chosen = attention.choose(config_of(None), torch.bfloat16, torch.device("cpu"), BLOCK)
    assert isinstance(chosen, TorchAttention)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_flash3_follows_the_definition(batch, window, captured):
    flash = attention.load_flash3()
    if flash is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs vLLM's CUDA build and a Hopper GPU")
    if captured and any(length > 1 for length, _ in batch):
        pytest.skip("only decode steps are captured")
    backend = attention.Flash3Attention(flash, config_of(window), torch.bfloat16, BLOCK)
    check(backend, batch, window, torch.bfloat16, "cuda", captured)
