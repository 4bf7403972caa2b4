"""Tokens drawn on the device, against frequencies known in advance; and what must not change a draw."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.errors import SettingError
from rowint8.baseline_engine.sampler import SamplingState, sample

LOGITS = torch.tensor([1.0, 3.0, 0.5, 2.5, -1.0, 2.0])


def tokens_of(logits: torch.Tensor, *params: SamplingParams) -> list[int]:
    """One token a row, nothing having come before."""
    states = [SamplingState(param) for param in params]
    return sample(logits, states, [[]] * len(params)).tokens.tolist()


def draws(params: SamplingParams, count: int, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    state = SamplingState(params)
    return torch.cat([sample(logits[None], [state], [[]]).tokens for _ in range(count)])


def frequencies(params: SamplingParams, count: int = 20_000) -> torch.Tensor:
    """Of one draw in each of `count` rows that share one source of random numbers."""
    state = SamplingState(params)
    chosen = sample(LOGITS.expand(count, -1), [state] * count, [[]] * count).tokens
    return torch.bincount(chosen, minlength=len(LOGITS)) / count


def test_greedy_takes_the_most_likely_token_of_each_row():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, 3.0]])
    assert tokens_of(logits, SamplingParams(), SamplingParams()) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature):
    seen = frequencies(SamplingParams(temperature=temperature, seed=0))
    torch.testing.assert_close(seen, (LOGITS / temperature).softmax(0), rtol=0, atol=0.015)


def test_top_k_draws_from_the_k_most_likely_in_proportion():
    seen = frequencies(SamplingParams(temperature=1.0, top_k=2, seed=0))
    expected = torch.zeros(len(LOGITS))
    expected[[1, 3]] = LOGITS[[1, 3]].softmax(0)
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.015)


def test_top_p_draws_from_the_fewest_tokens_that_reach_p():
    probabilities = LOGITS.softmax(0)  # 0.42 (token 1), 0.26 (3), 0.16 (5), ...
    reached_by_two = float(probabilities[[1, 3]].sum())
    just_two = frequencies(SamplingParams(temperature=1.0, top_p=reached_by_two - 0.01, seed=0))
    assert just_two.nonzero().flatten().tolist() == [1, 3]
    three = frequencies(SamplingParams(temperature=1.0, top_p=reached_by_two + 0.01, seed=0))
    assert three.nonzero().flatten().tolist() == [1, 3, 5]
    torch.testing.assert_close(three[[1, 3, 5]], LOGITS[[1, 3, 5]].softmax(0), rtol=0, atol=0.015)


def test_top_p_applies_to_what_top_k_left():
    """Of two tokens left, the first holds 0.62 of the probability and so reaches 0.6 alone; of all it holds 0.42."""
    seen = frequencies(SamplingParams(temperature=1.0, top_k=2, top_p=0.6, seed=0), count=200)
    assert seen.nonzero().flatten().tolist() == [1]


def test_min_p_draws_from_tokens_likely_enough_beside_the_best():
    seen = frequencies(SamplingParams(temperature=1.0, min_p=math.exp(-1.01), seed=0))
    expected = torch.zeros(len(LOGITS))
    expected[[1, 3, 5]] = LOGITS[[1, 3, 5]].softmax(0)  # at most 1.01 below the best
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.015)


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(1e-5, 1e5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_draw_is_always_a_token_that_is_allowed(logits, temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    scores = torch.tensor(logits)
    token = int(draws(params, 1, scores))
    assert int((scores > scores[token]).sum()) < (top_k or len(logits))
    ratio = (float(scores[token]) - float(scores.max())) / temperature
    assert math.exp(ratio) >= min_p * (1 - 1e-3) - 1e-6


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-5}])
def test_narrow_choices_are_greedy(params):
    assert set(draws(SamplingParams(**({"temperature": 2.0, "seed": 0} | params)), 100).tolist()) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_repetition_penalty_follows_its_definition(temperature):
    """Logits of tokens seen are divided by it where positive, else multiplied; drawn tokens count as seen."""
    params = SamplingParams(temperature=temperature, repetition_penalty=2.0, seed=0)
    state, logits = SamplingState(params), torch.tensor([[-1.0, 4.0, 3.0, -1.5]])
    if temperature == 0:
        chosen = [int(sample(logits, [state], [[3]]).tokens) for _ in range(4)]
        assert chosen == [1, 2, 1, 1], "4 > 3; then 3 > 4 / 2; then 4 / 2 > 3 / 2 for good"
        return
    states = [SamplingState(SamplingParams(temperature=1, repetition_penalty=2.0, seed=i)) for i in range(20_000)]
    drawn = sample(logits.expand(len(states), -1), states, [[1, 3]] * len(states)).tokens
    expected = torch.tensor([-1.0, 2.0, 3.0, -3.0]).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / len(states), expected, rtol=0, atol=0.015)


def test_a_penalty_leaves_other_rows_and_the_logits_alone():
    logits = torch.tensor([[1.0, 4.0], [1.0, 4.0]], dtype=torch.bfloat16)
    kept = logits.clone()
    states = [SamplingState(SamplingParams(repetition_penalty=10.0)), SamplingState(SamplingParams())]
    assert sample(logits, states, [[1], [1]]).tokens.tolist() == [0, 1]
    assert torch.equal(logits, kept)


def test_a_seed_repeats_and_another_does_not():
    first, again, other = (draws(SamplingParams(temperature=2.0, seed=seed), 50).tolist() for seed in (5, 5, 6))
    assert first == again != other
    unseeded = [draws(SamplingParams(temperature=2.0), 50).tolist() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("restriction", [{}, {"top_p": 0.95}, {"min_p": 0.1, "top_k": 4}])
def test_a_row_draws_the_same_whatever_its_neighbours_are(restriction):
    params = SamplingParams(temperature=1.0, seed=3, **restriction)
    neighbours = (SamplingParams(), SamplingParams(temperature=9.0), SamplingParams(temperature=2.0, top_k=3))
    alone, among = SamplingState(params), [SamplingState(each) for each in (*neighbours, params)]
    for _ in range(50):
        batch = torch.cat([torch.randn(3, 6), LOGITS[None]])
        together = sample(batch, among, [[]] * 4).tokens.tolist()
        assert together[3] == int(sample(LOGITS[None], [alone], [[]]).tokens)


def test_logprobs_come_as_many_as_the_greediest_row_asks_for():
    params = [SamplingParams(logprobs=2), SamplingParams(), SamplingParams(logprobs=0)]
    sampled = sample(LOGITS.expand(3, -1), [SamplingState(each) for each in params], [[]] * 3)
    expected = LOGITS.log_softmax(0)[[1, 1, 3]]
    torch.testing.assert_close(sampled.logprobs, expected.expand(3, -1))
    assert sampled.top_ids.tolist() == [[1, 3]] * 3
    assert sample(LOGITS[None], [SamplingState(SamplingParams())], [[]]).logprobs is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it should be greater than or equal to 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it should be 0 or greater than or equal to 0.00001"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"top_k": -1, "temperature": 1.0}, "top_k is -1; it should be greater than or equal to 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0; it should be greater than 0"),
        ({"top_p": 1.1, "temperature": 1.0}, "top_p is 1.1"),
        ({"top_p": float("nan"), "temperature": 1.0}, "top_p is nan"),
        ({"min_p": -0.1, "temperature": 1.0}, "min_p is -0.1; it should be greater than or equal to 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it should be greater than or equal to 0.01"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": ("",)}, r"stop\[0\] is ''; String should have at least 1 character"),
        ({"stop": "END"}, "stop is 'END'; it should be a valid tuple"),
        ({"logprobs": 21}, "logprobs is 21; it should be less than or equal to 20"),
        ({"top_k": 5}, "no effect at temperature 0; set a temperature"),
        ({"top_p": 0.5}, "no effect at temperature 0; set a temperature"),
        ({"min_p": 0.5}, "no effect at temperature 0; set a temperature"),
    ],
)
def test_bad_values_are_refused(params, message):
    with pytest.raises(SettingError, match=message):
        SamplingParams(**params)
