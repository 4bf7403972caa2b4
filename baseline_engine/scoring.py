"""How likely the model finds given tokens: for evaluation, where a text is read and nothing is generated.

Texts pass through the runner in the chunks that the scheduler makes of requests, many texts a step and over the same
paged cache. Logits are made for the scored tokens only, `max_seqs` of them at a time, as in a decode step: no array of
all tokens times the vocabulary is ever held.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.engine import Engine, explain_not_finite
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.model import Decoder
from rowint8.baseline_engine.scheduler import Chunk, Scheduler
from rowint8.baseline_engine.transfer import to_device


class Text(NamedTuple):
    """Tokens, of which those from index `start` on are scored; all before them are context."""

    tokens: list[int]
    start: int
    """1 or more: nothing predicts the first token."""


class Score(NamedTuple):
    """One entry for each scored token."""

    logprobs: list[float]
    """Natural logarithms of their probabilities."""
    greedy: list[bool]
    """Whether the token is the likeliest."""


def score(engine: Engine, texts: Sequence[Text]) -> list[Score]:
    """Scores the texts together; the engine must have no requests meanwhile.

    Raises:
        EngineError: the engine is at work, or a text has no context, nothing to score, too many tokens (its last is
            not computed and does not count) or one outside the vocabulary; or the model's logits are NaN or infinite.
    """
    if engine.has_work:
        raise EngineError("the engine has requests; score when they are complete")
    for index, (tokens, start) in enumerate(texts):
        engine.encode(tokens)
        if not 1 <= start < len(tokens):
            raise EngineError(f"text {index + 1} starts at {start} of {len(tokens)}; give 1 to its last token's index")
    scheduler = Scheduler(
        engine.scheduler.pool, engine.config.max_seqs, engine.config.max_batch_tokens, prefix_caching=False
    )
    params = SamplingParams(max_tokens=1)
    requests = [engine.make_request(text.tokens[:-1], params, index=index) for index, text in enumerate(texts)]
    scores = [Score([0.0] * (len(tokens) - start), [False] * (len(tokens) - start)) for tokens, start in texts]
    for request in requests:
        scheduler.add(request)
    try:
        while scheduler.waiting or scheduler.running:
            chunks = scheduler.schedule()
            _score_step(engine, chunks, texts, scores)
            scheduler.commit(chunks)
            for chunk in chunks:
                if chunk.samples:
                    scheduler.finish(chunk.request)
    except BaseException:
        engine.scheduler.reset()  # the blocks of a step that was broken off
        raise
    return scores


@torch.inference_mode()
def _score_step(engine: Engine, chunks: Sequence[Chunk], texts: Sequence[Text], scores: Sequence[Score]) -> None:
    """Computes the chunks and enters what they predict. A text computed again after preemption is entered again."""
    hidden = engine.runner.hidden(chunks)
    rows, targets, places, before = [], [], [], 0
    for request, first, count, _ in chunks:
        tokens, start = texts[request.index]
        for position in range(max(first, start - 1), first + count):
            rows.append(before + position - first)
            targets.append(tokens[position + 1])
            places.append((request.index, position + 1 - start))
        before += count
    size = engine.config.max_seqs
    for part in (slice(begin, begin + size) for begin in range(0, len(rows), size)):
        row, target = (to_device(numbers[part], hidden.device, np.int64) for numbers in (rows, targets))
        logprobs, greedy = (numbers.tolist() for numbers in _predictions(engine.model, hidden[row], target))
        if any(map(math.isnan, logprobs)):
            raise EngineError(explain_not_finite(hidden.dtype))
        for (index, place), logprob, likeliest in zip(places[part], logprobs, greedy, strict=True):
            scores[index].logprobs[place], scores[index].greedy[place] = logprob, likeliest


def _predictions(model: Decoder, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [n, hidden], targets int64 [n] -> their logprobs fp32 [n], and whether each is the likeliest, bool [n]."""
    logits = model.logits(hidden).float()
    logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return logprobs, logits.argmax(-1) == targets
