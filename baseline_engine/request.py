"""One prompt on its way to becoming a completion, and what the caller gets of it."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Generator

from rowint8.baseline_engine.metrics import RequestMetrics
from rowint8.baseline_engine.sampler import SamplingParams

FinishReason = Literal["stop", "length"]


class TokenEvent(NamedTuple):
    """One new token, as handed to `on_token`."""

    request: int
    """Index of the prompt."""
    token_id: int
    text: str
    """The text that this token completes, maybe none; empty without a tokenizer."""
    finish_reason: FinishReason | None
    """"stop" at an end-of-sequence token, "length" at max_tokens or the end of the context, else None."""


@dataclass(frozen=True)
class Completion:
    """What became of one prompt."""

    text: str
    """Without special tokens; empty without a tokenizer."""
    token_ids: list[int]
    """The end-of-sequence token included."""
    finish_reason: FinishReason
    metrics: RequestMetrics


@dataclass
class Request:
    """The state of one prompt: row `index` of the cache, the tokens so far."""

    index: int
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """`params.max_tokens`, clipped so that prompt and output fit the context."""
    eos_token_ids: frozenset[int]
    generator: Generator | None
    output_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def last_position(self) -> int:
        """Position of the newest token in the sequence."""
        return len(self.prompt_ids) + len(self.output_ids) - 1

    def append(self, token_id: int, time: float) -> None:
        """Records a new token and whether it is the last."""
        self.output_ids.append(token_id)
        self.token_times.append(time)
        if token_id in self.eos_token_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.max_tokens:
            self.finish_reason = "length"
