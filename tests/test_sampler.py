"""Greedy and random choice of tokens: what is drawn, how often, and that requests do not disturb each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rowint8.baseline_engine.errors import SettingError
from rowint8.baseline_engine.sampler import SamplingParams, draw, sample

CPU = torch.device("cpu")
LOGITS = torch.tensor([1.0, 3.0, 0.5, 2.5, -1.0, 2.0])


def draws(params: SamplingParams, count: int, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    generator = params.generator(CPU)
    assert generator is not None
    return torch.stack([draw(logits, params, generator) for _ in range(count)])


def frequencies(params: SamplingParams, count: int = 20_000) -> torch.Tensor:
    return torch.bincount(draws(params, count), minlength=len(LOGITS)) / count


def test_greedy_takes_the_most_likely_token_of_each_row():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, 3.0]])
    assert sample(logits, [(SamplingParams(), None)] * 2) == [1, 0]


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


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(1e-5, 1e5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_draw_is_always_a_token_that_top_k_allows(logits, temperature, top_k, top_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    scores = torch.tensor(logits)
    token = int(draws(params, 1, scores))
    better = int((scores > scores[token]).sum())
    assert better < (top_k or len(logits))


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-5}])
def test_narrow_choices_are_greedy(params):
    assert set(draws(SamplingParams(**({"temperature": 2.0, "seed": 0} | params)), 100).tolist()) == {1}


def test_a_seed_repeats_and_another_does_not():
    first, again, other = (draws(SamplingParams(temperature=2.0, seed=seed), 50).tolist() for seed in (5, 5, 6))
    assert first == again != other
    unseeded = [draws(SamplingParams(temperature=2.0), 50).tolist() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_a_row_draws_the_same_whatever_its_neighbours_are():
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=3)
    neighbours = [
        (SamplingParams(), None),
        (SamplingParams(temperature=9.0), SamplingParams(temperature=9.0).generator(CPU)),
    ]
    alone = params.generator(CPU)
    among = params.generator(CPU)
    for _ in range(50):
        batch = torch.stack([torch.randn(6), LOGITS, torch.randn(6)])
        choices = [neighbours[0], (params, among), neighbours[1]]
        assert sample(batch, choices)[1] == sample(LOGITS[None], [(params, alone)])[0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; at least 1"),
        ({"temperature": -0.1}, r"temperature is -0.1; accepted is 0 \(greedy\) or at least 1e-05"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"top_k": -1, "temperature": 1.0}, "top_k is -1; accepted is 1 or more, or 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0; accepted is above 0 and up to 1"),
        ({"top_p": 1.1, "temperature": 1.0}, "top_p is 1.1"),
        ({"top_p": float("nan"), "temperature": 1.0}, "top_p is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"top_k": 5}, "no effect at temperature 0; set a temperature"),
        ({"top_p": 0.5}, "no effect at temperature 0; set a temperature"),
    ],
)
def test_bad_values_are_refused(params, message):
    with pytest.raises(SettingError, match=message):
        SamplingParams(**params)
