"""What a captured step computes, padding included, without a GPU: its graph is replayed by computing anew."""

from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rowint8.baseline_engine import graphs as graphs_module
from rowint8.baseline_engine.config import SamplingParams
from tests.baseline_engine.harness import assert_all_memory_returned, engine_for, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny

LIMITS = {"max_seqs": 12, "cache_tokens": 2048, "max_batch_tokens": 64}


class ReadsLengthsOnTheDevice:
    """What a graph asks of attention: of the layout only tensors are read, and only when a layer calls."""

    name = "test"

    def __init__(self, plain, captures_prompts):
        self._plain, self.captures_prompts = plain, captures_prompts

    def plan(self, layout):
        if not layout.captured:
            return self._plain.plan(layout)

        def attend(queries, keys, values):
            out = torch.full_like(queries, torch.nan)  # of tokens outside of every sequence
            starts = layout.query_start.tolist()
            for row, (start, end) in enumerate(pairwise(starts)):
                length = int(layout.seq_lens[row])
                table = layout.block_tables[row, : -(-length // keys.shape[1])]
                assert len(table) * keys.shape[1] >= length
                if end > start:
                    k, v = (cache[table].flatten(0, 1)[:length].transpose(0, 1) for cache in (keys, values))
                    visible = torch.ones(length, length, dtype=torch.bool).tril()[length - (end - start) :]
                    q = queries[start:end].transpose(0, 1)
                    out[start:end] = scaled_dot_product_attention(
                        q, k, v, attn_mask=visible, enable_gqa=True
                    ).transpose(0, 1)
            return out

        return attend


class Replays:
    """Stands in for CUDA graphs and counts."""

    sizes: ClassVar[list[int]] = []

    @staticmethod
    def capture_graph(compute, device, pool):
        out = compute().clone()

        def replay():
            Replays.sizes.append(len(out))
            out.copy_(compute())

        return replay, out


@pytest.fixture
def capture(monkeypatch):
    """Makes an engine's steps captured ones."""
    monkeypatch.setattr(graphs_module, "capture_graph", Replays.capture_graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    Replays.sizes.clear()

    def apply(engine, prompt_sizes, captures_prompts=True):
        engine.runner.attention = ReadsLengthsOnTheDevice(engine.runner.attention, captures_prompts)
        engine.runner.capture([1, 4, 12], prompt_sizes)
        return engine

    return apply


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("lengths", [[5], [1], [16], [63], [3, 17, 1, 30], [7] * 9, [40, 60, 50]])
def test_captured_steps_write_what_plain_ones_do(folder, capture, lengths):
    prompts, params = prompts_of_ids(*lengths), SamplingParams(max_tokens=10)
    expected = tokens_of(engine_for(folder, **LIMITS), prompts, params)
    engine = capture(engine_for(folder, **LIMITS), [32, 48, 64])
    assert tokens_of(engine, prompts, params) == expected
    assert len(Replays.sizes) == engine.times.steps  # no step ran outside of a graph
    assert_all_memory_returned(engine)


def test_block_tables_are_sent_only_when_they_change(folder, capture, monkeypatch):
    sent, to_device = [], graphs_module.to_device

    def counted(values, device):
        sent.append(values)
        return to_device(values, device)

    monkeypatch.setattr(graphs_module, "to_device", counted)
    engine = capture(engine_for(folder, **LIMITS), [32])
    sent.clear()
    size = engine.config.block_size
    tokens_of(engine, prompts_of_ids(size - 2), SamplingParams(max_tokens=size))
    assert len(sent) == 1 + 1 + 1, "the prompt's graph, the first decode step, and one more block"


def test_a_step_that_fits_no_graph_runs_without(folder, capture, monkeypatch):
    monkeypatch.setattr(graphs_module, "PROMPT_CONTEXT", 20)
    prompts, params = prompts_of_ids(40, 30), SamplingParams(max_tokens=3)
    expected = tokens_of(engine_for(folder, **LIMITS), prompts, params)
    engine = capture(engine_for(folder, **LIMITS), [32, 64])
    assert tokens_of(engine, prompts, params) == expected
    assert 0 < len(Replays.sizes) < engine.times.steps


def test_prompts_are_captured_only_where_attention_can(folder, capture):
    engine = capture(engine_for(folder, **LIMITS), [32, 64], captures_prompts=False)
    tokens_of(engine, prompts_of_ids(5), SamplingParams(max_tokens=4))
    assert engine.runner.prompt_graphs == []
    assert len(Replays.sizes) == 3
