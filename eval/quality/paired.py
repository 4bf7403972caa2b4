"""Statistics of a metric over documents, and of its difference between two models on the same documents.

lm-eval's metrics are functions of a mean: of a value for each document (accuracy), or of log-likelihoods over the words
or bytes of all documents (perplexities). Standard errors are the jackknife's (Efron and Stein 1981): the metric anew
without each document in turn. For a plain mean that is the usual stdev (n - 1) / sqrt(n). The difference of two models
is taken without each document in both, so what makes a document hard for both cancels.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

_OF_MEAN: dict[str, Callable[[float], float]] = {
    "perplexity": lambda mean: math.exp(-mean),
    "word_perplexity": lambda mean: math.exp(-mean),
    "byte_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
"""What a metric is of the mean, where it is not the mean itself."""
_WEIGHTED = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics whose values come with a weight: the document's words or bytes."""


class Item(NamedTuple):
    """What one document adds to a metric."""

    value: float
    weight: float
    """The document's weight in the mean, sum of values / sum of weights; 1 where all count alike."""


@dataclass(frozen=True)
class PairedDifference:
    """How the metric of one model, the other, differs from that of the base over the same documents."""

    difference: float
    """Other minus base."""
    stderr: float
    gained: int | None
    """Documents that only the other answers rightly; None where the values are not all 0 or 1, as is `lost`."""
    lost: int | None


def item(metric: str, value: Any) -> Item | None:
    """What lm-eval noted of one document for a metric; None where it is no number, or no number with its weight."""
    parts = value if metric in _WEIGHTED else (value, 1.0)
    match parts:
        case (Real(), Real()):
            return Item(float(parts[0]), float(parts[1]))
    return None


def metric_value(metric: str, items: Sequence[Item]) -> float:
    """The metric over all documents."""
    return _of_sums(metric, sum(item.value for item in items), sum(item.weight for item in items))


def standard_error(metric: str, items: Sequence[Item]) -> float:
    """Standard error of `metric_value`.

    Raises:
        ValueError: fewer than two documents.
    """
    return _jackknife(_without_each(metric, items))


def paired_difference(metric: str, base: Sequence[Item], other: Sequence[Item]) -> PairedDifference:
    """Compares two models document by document.

    Raises:
        ValueError: the two differ in length, or there are fewer than two documents.
    """
    replicates = zip(_without_each(metric, base), _without_each(metric, other), strict=True)
    stderr = _jackknife([b - a for a, b in replicates])
    gained = lost = None
    if {part.value for part in (*base, *other)} <= {0.0, 1.0}:
        gained = sum(b.value > a.value for a, b in zip(base, other, strict=True))
        lost = sum(b.value < a.value for a, b in zip(base, other, strict=True))
    return PairedDifference(metric_value(metric, other) - metric_value(metric, base), stderr, gained, lost)


def _of_sums(metric: str, value: float, weight: float) -> float:
    mean = value / weight
    return _OF_MEAN[metric](mean) if metric in _OF_MEAN else mean


def _without_each(metric: str, items: Sequence[Item]) -> list[float]:
    """The metric over all documents but one, for each one."""
    if len(items) < 2:
        raise ValueError(f"a standard error needs at least two documents, got {len(items)}")
    value, weight = sum(item.value for item in items), sum(item.weight for item in items)
    return [_of_sums(metric, value - item.value, weight - item.weight) for item in items]


def _jackknife(replicates: Sequence[float]) -> float:
    return statistics.stdev(replicates) * (len(replicates) - 1) / math.sqrt(len(replicates))
