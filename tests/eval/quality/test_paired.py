"""rowint8.eval.quality.paired: against numbers worked out by hand, formulas for means, and lm-eval's own metrics."""

import math
import random
import statistics

import pytest
from lm_eval.api import metrics as lm_eval

from rowint8.eval.quality.paired import Item, item, metric_value, paired_difference, standard_error


def plain(*values):
    return [Item(float(value), 1.0) for value in values]


def test_mean_by_hand():
    assert metric_value("acc", plain(1, 2, 3, 4)) == 2.5
    assert standard_error("acc", plain(1, 2, 3, 4)) == pytest.approx(math.sqrt(5 / 3) / 2)


def test_difference_by_hand():
    found = paired_difference("acc", plain(1, 1, 0, 0), plain(1, 0, 1, 1))
    # differences 0, -1, 1, 1: mean 1/4, squared deviations 1/16 + 25/16 + 9/16 + 9/16 = 44/16, variance 11/12
    assert found.difference == 0.25
    assert found.stderr == pytest.approx(math.sqrt(11 / 12) / 2)
    assert (found.gained, found.lost) == (2, 1)


def test_equal_models_do_not_differ():
    found = paired_difference("acc", plain(1, 0, 1), plain(1, 0, 1))
    assert (found.difference, found.stderr, found.gained, found.lost) == (0, 0, 0, 0)


def test_only_right_and_wrong_can_flip():
    found = paired_difference("logprob", plain(-1.0, -2.5), plain(-2.0, -0.5))
    assert (found.gained, found.lost) == (None, None)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="longer"):
        paired_difference("acc", plain(1, 0), plain(1, 0, 1))
    with pytest.raises(ValueError, match="at least two documents, got 1"):
        paired_difference("acc", plain(1), plain(0))


@pytest.mark.parametrize(
    ("metric", "aggregate"),
    [
        ("perplexity", lm_eval.perplexity),
        ("word_perplexity", lm_eval.weighted_perplexity),
        ("byte_perplexity", lm_eval.weighted_perplexity),
        ("bits_per_byte", lm_eval.bits_per_byte),
    ],
)
def test_perplexities_are_those_of_lm_eval(metric, aggregate):
    noted = [-3.5, -1.25, -9.0] if metric == "perplexity" else [(-90.5, 30), (-41.0, 17), (-7.25, 2)]
    items = [item(metric, value) for value in noted]
    assert metric_value(metric, items) == pytest.approx(aggregate(noted), rel=1e-12)


def test_standard_error_of_a_ratio_is_near_its_linear_approximation():
    """Of exp(-R), R = sum of values / sum of weights, to first order: exp(-R) times that of (value - R weight)."""
    draw = random.Random(0)
    weights = [draw.randint(50, 150) for _ in range(400)]
    base = [Item(-weight * draw.uniform(1.9, 2.1), weight) for weight in weights]
    other = [Item(value - weight * draw.uniform(0.0, 0.02), weight) for value, weight in base]

    def influences(items):
        mean = sum(value for value, _ in items) / sum(weights)
        scale = math.exp(-mean) / statistics.fmean(weights)
        return [-scale * (value - mean * weight) for value, weight in items]

    differences = [b - a for a, b in zip(influences(base), influences(other), strict=True)]
    found = paired_difference("word_perplexity", base, other)
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(len(differences)), rel=0.02)
    assert found.stderr < standard_error("word_perplexity", other) / 5, "what they share must cancel"
    assert 0 < found.difference == metric_value("word_perplexity", other) - metric_value("word_perplexity", base)


@pytest.mark.parametrize(
    ("metric", "noted", "wanted"),
    [
        ("acc", 1, Item(1.0, 1.0)),
        ("acc", True, Item(1.0, 1.0)),
        ("bits_per_byte", (-8.0, 5), Item(-8.0, 5.0)),
        ("bits_per_byte", -8.0, None),
        ("f1", (1, 0), None),
        ("bleu", ("a text", "another"), None),
        ("acc", None, None),
    ],
)
def test_what_lm_eval_notes(metric, noted, wanted):
    assert item(metric, noted) == wanted
