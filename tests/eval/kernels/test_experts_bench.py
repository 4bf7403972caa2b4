"""`rowint8 bench kernels --op experts`: rows on the CPU, where a time is the number of calls."""

import pytest
import torch

from rowint8.eval.errors import EvalError
from rowint8.eval.kernels import experts_bench
from rowint8.eval.kernels.experts_bench import ExpertsBench, grouped, random_routing, random_weights, vllm_dense
from rowint8.eval.kernels.experts_sweep import candidates, widths
from rowint8.eval.kernels.shapes import EXPERTS, ExpertsShape, select_experts
from rowint8.eval.results.roofline import bytes_moved, operations
from rowint8.kernels import ops
from rowint8.kernels.experts.tiles import pick_tile
from rowint8.kernels.tiles.card import Card

TINY = ExpertsShape("tiny", 6, 2, 48, 32)


def count(calls):
    """A capture whose time is the number of calls; the first is made."""
    calls[0]()
    return lambda: float(len(calls))


def test_every_count_has_a_row_for_each_routing(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(experts_bench, "grouped", lambda *given: lambda call: lambda: None)
    rows = list(ExpertsBench(torch.bfloat16, said.append, True, "cpu", count).rows([TINY], (1, 1024)))
    assert [(row.shape, row.M) for row in rows] == [
        (f"tiny/{routing}", m) for m in (1, 1024) for routing in ("uniform", "zipf")
    ]
    assert {"rowint8", "grouped_bf16"} <= set(rows[0].us)
    assert [("rowint8_dense" in row.us) for row in rows] == [False, False, True, True]
    assert rows[0].experts_used == 2
    assert rows[2].experts_used == 6


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(experts_bench, "vllm_int8", lambda weights: lambda call: call.x + 1)
    rows = list(ExpertsBench(torch.bfloat16, said.append, True, "cpu", count).rows([TINY], (3,)))
    assert not any("vllm_int8" in row.us for row in rows)
    assert any(line.startswith("without vllm_int8: ValueError: it computes something else") for line in said)


def test_ceilings_count_the_experts_in_use():
    (row, *_) = ExpertsBench(torch.bfloat16, print, False, "cpu", count).rows([TINY], (1,))
    assert bytes_moved(row) == 2 * (3 * 32 * 48 + 2 * (2 * 32 + 48)) + 2 * 48
    assert operations(row) == 2 * 2 * 3 * 32 * 48


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_a_token_has_distinct_experts(routing):
    ids = random_routing(EXPERTS["qwen3-30b-a3b"], 200, routing, torch.float32, "cpu").ids
    assert all(len(set(token)) == 8 for token in ids.tolist())
    most = torch.bincount(ids.flatten(), minlength=128).max() / 200
    assert most > 0.5 if routing == "zipf" else most < 0.2


def test_torchs_grouped_product_is_that_of_the_sorted_tokens():
    shape = ExpertsShape("even", 4, 2, 64, 32)
    weights = random_weights(shape, "cpu")
    call = random_routing(shape, 5, "uniform", torch.bfloat16, "cpu")
    try:
        out = grouped(torch.bfloat16, weights)(call)()
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"torch has none here: {error}")
    pair = call.ids.flatten().argsort(stable=True)[0]
    alone = call.ids.flatten()[pair].view(1, 1)
    expected = ops.experts(call.x[pair // 2][None], *weights, torch.ones(1, 1), alone)
    assert torch.allclose(out[0].float(), expected[0].float(), rtol=0.05, atol=0.02)


def test_vllms_dense_weights_are_ours():
    pytest.importorskip("vllm")
    weights = random_weights(TINY, "cpu")
    assert callable(vllm_dense(torch.float32, weights))


def test_other_layers_are_refused_by_name():
    with pytest.raises(EvalError, match="--shapes has gate_up; with --op experts accepted are qwen3-30b-a3b, mixtral"):
        select_experts("gate_up")


@pytest.mark.parametrize("m", [1, 8, 128, 8192])
def test_the_sweep_tries_tiles_about_as_wide_as_an_experts_tokens(m):
    shape = EXPERTS["qwen3-30b-a3b"]
    tried = list(widths(shape, m))
    shipped = pick_tile(m, shape.topk, shape.experts, 2, Card(232_448, 132))
    assert shipped.block_m in {width for width, _ in tried}
    assert len(tried) == len(set(tried)) <= 16
    for gate_up in (True, False):
        assert 10 < len(list(candidates(shipped, gate_up))) < 80
