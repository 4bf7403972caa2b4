"""Logits to the next token, for a whole batch on the device: greedy, or drawn.

A draw takes one uniform number u, made on the host from the request's own seed, and picks the first token at which the
cumulative probability exceeds u (inversion). So what a request draws depends on its seed and its logits alone: not on
what it is batched with, and not on the kind of device.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.transfer import to_device

NOT_FINITE = -1
"""Stands for the token that was to be chosen from NaN or infinite logits."""


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities that the model gives, before penalties and temperature."""

    chosen: float
    top: dict[int, float]
    """Token id to logprob, likeliest first."""


@dataclass
class SamplingState:
    """One request's parameters, and what must be remembered between its draws."""

    params: SamplingParams
    uniform: random.Random = field(init=False)
    seen: Tensor | None = None
    """bool [vocabulary] on the device, for the repetition penalty."""

    def __post_init__(self) -> None:
        self.uniform = random.Random(self.params.seed)


class Sampled(NamedTuple):
    """On the device, one row a request."""

    tokens: Tensor
    """int64 [n]; NOT_FINITE where the logits hold NaN or infinity."""
    logprobs: Tensor | None
    """fp32 [n, 1 + k]: of the chosen token, then of the k likeliest."""
    top_ids: Tensor | None
    """int64 [n, k]."""


def sample(logits: Tensor, states: Sequence[SamplingState], tokens_so_far: Sequence[Sequence[int]]) -> Sampled:
    """The next token of each row of logits [n, vocabulary], by that row's parameters.

    `tokens_so_far` (prompt and output on the host) is read only at a request's first sampling.
    """
    choices = _penalize(logits, states, tokens_so_far)
    best, tokens = choices.max(dim=-1)
    drawn = [row for row, state in enumerate(states) if state.params.temperature > 0]
    for restricted in (False, True):
        rows = [row for row in drawn if _is_restricted(states[row].params) is restricted]
        if rows:
            index = to_device(rows, logits.device, np.int64)
            tokens[index] = draw(choices[index], [states[row] for row in rows], restricted)
    for row, state in enumerate(states):
        if state.seen is not None:
            state.seen.index_fill_(0, tokens[row : row + 1], True)  # an index of no dimension would wait for the device
    logprobs = _logprobs(logits, tokens, states)
    # The largest of numbers among which there is NaN is NaN.
    return Sampled(torch.where(best.abs() < torch.inf, tokens, NOT_FINITE), *logprobs)


def _is_restricted(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def draw(logits: Tensor, states: Sequence[SamplingState], restricted: bool) -> Tensor:
    """One token id a row (int64 [n]) from logits [n, vocabulary]: temperature, then min-p, top-k and top-p.

    `restricted` is whether top-k or top-p apply, which need the tokens sorted.
    """
    rows = [state.params for state in states]
    settings = [(p.temperature, p.min_p, p.top_k or logits.shape[1], p.top_p) for p in rows]
    temperature, min_p, top_k, top_p = to_device(settings, logits.device, np.float32).T[..., None]
    scores = (logits.float() - logits.amax(-1, keepdim=True)) / temperature
    probabilities = scores.softmax(-1)
    probabilities *= probabilities >= min_p * probabilities.amax(-1, keepdim=True)
    if not restricted:
        return _invert(probabilities, states)
    probabilities, tokens = probabilities.sort(descending=True, stable=True)
    probabilities *= torch.arange(probabilities.shape[1], device=logits.device) < top_k
    probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    outside = before >= top_p
    outside[:, 0] = False  # the likeliest token stays, however small p is
    return tokens.gather(1, _invert(probabilities.masked_fill(outside, 0), states)[:, None])[:, 0]


def _invert(weights: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """The first index of each row of weights [n, V] at which their sum so far exceeds u times the whole."""
    # u has 32 bits: u times the total is below the total in fp64, so an index is always found.
    uniforms = [state.uniform.getrandbits(32) / 2**32 for state in states]
    sums = weights.cumsum(-1, dtype=torch.float64)
    targets = to_device(uniforms, weights.device, np.float64)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)  # beyond with NaN


def _penalize(logits: Tensor, states: Sequence[SamplingState], tokens_so_far: Sequence[Sequence[int]]) -> Tensor:
    """Logits after repetition penalties; the same tensor where there are none."""
    rows = [row for row, state in enumerate(states) if state.params.repetition_penalty != 1]
    if not rows:
        return logits
    penalized = logits.to(torch.float32, copy=True)
    for row in rows:
        state, scores = states[row], penalized[row]
        if state.seen is None:
            state.seen = torch.zeros_like(scores, dtype=torch.bool)
            state.seen[to_device(tokens_so_far[row], logits.device, np.int64)] = True
        penalty = state.params.repetition_penalty
        penalized[row] = torch.where(state.seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    return penalized


def _logprobs(logits: Tensor, tokens: Tensor, states: Sequence[SamplingState]) -> tuple[Tensor | None, Tensor | None]:
    """As in `Sampled`; (None, None) where no request asks for them."""
    most = max((state.params.logprobs for state in states if state.params.logprobs is not None), default=None)
    if most is None:
        return None, None
    logprobs = logits.float().log_softmax(-1)
    top, ids = logprobs.topk(most)
    return torch.cat((logprobs.gather(1, tokens[:, None]), top), dim=1), ids
