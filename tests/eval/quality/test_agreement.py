"""The comparison of the two engines: its arithmetic on made-up tokens, and the claim itself on the real model."""

import pytest

from rowint8.eval.quality import agreement
from rowint8.eval.report.quality import compared


def test_rows_count_the_common_beginning_and_the_gap():
    theirs = {"token_ids": [5, 6, 9, 8], "logprobs": [{"5": -0.1}, {"6": -0.2}, {"9": -0.7, "7": -0.75}, {"8": 0.0}]}
    row = agreement.row_of("a prompt", [5, 6, 7, 8], theirs, "float32")
    assert (row.tokens, row.agreed) == (4, 2)
    assert row.logprob_gap == pytest.approx(0.05)


def test_equal_tokens_have_no_gap():
    row = agreement.row_of("a prompt", [5, 6], {"token_ids": [5, 6], "logprobs": [{}, {}]}, "float32")
    assert (row.agreed, row.logprob_gap) == (2, None)


def test_a_token_outside_vllms_candidates_is_at_least_as_far_as_the_last_of_them():
    theirs = {"token_ids": [1], "logprobs": [{"1": -0.5, "2": -3.0}]}
    assert agreement.row_of("a prompt", [4], theirs, "float32").logprob_gap == pytest.approx(2.5)


@pytest.mark.vllm
def test_the_engines_agree_on_the_real_model(smollm2, monkeypatch):
    """After some of the prompts; results/agreement-cpu.json has all of them."""
    monkeypatch.setattr(agreement, "PROMPTS", agreement.PROMPTS[:4])
    rows = agreement.compare(smollm2, "float32")
    assert len(rows) == 4
    assert all(row.tokens == 32 for row in rows)
    assert sum(row.agreed == 32 for row in rows) >= 3
    # float32 logits of about 20 are known to about 1e-5 after 30 layers: only closer candidates may swap places.
    assert all(row.logprob_gap is None or row.logprob_gap < 1e-3 for row in rows)


def test_several_ranks_are_compared_with_one(smollm2, monkeypatch):
    asked = []

    def run_vllm(model, dtype, prompts, ranks):
        asked.append(ranks)
        return [{"token_ids": [7, ranks], "logprobs": [{"7": -0.1}, {"1": -0.3, "2": -0.2}]} for _ in prompts]

    monkeypatch.setattr(agreement, "run_vllm", run_vllm)
    rows = agreement.compare(smollm2, "float32", ranks=2)
    assert asked == [1, 2]
    assert [(row.agreed, row.tensor_parallel_size) for row in rows] == [(1, 2)] * 10
    assert rows[0].logprob_gap == pytest.approx(0.1)
    assert compared(rows) == "vLLM on 2 ranks against vLLM on one"
