"""Logits to the next token: greedy, or drawn with a temperature, top-k and top-p.

Every request draws from its own generator, row by row, so what it draws does not depend on what it is batched with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rowint8.baseline_engine.errors import SettingError

MIN_TEMPERATURE = 1e-5
"""Below it, differences between logits overflow; 0 is what is meant."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen."""

    max_tokens: int = 64
    """Most tokens to generate, the end-of-sequence token included; fewer where prompt and output fill the context."""
    temperature: float = 0.0
    """0 is greedy (the most likely token); larger is more random."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to at least p; 1 is off (arXiv:1904.09751)."""
    seed: int | None = None
    """Of this request's draws. The same seed, prompt and parameters give the same tokens; None draws a new seed."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever the model says; for measurements."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SettingError(f"max_tokens is {self.max_tokens}; at least 1 is needed")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise SettingError(
                f"temperature is {self.temperature}; accepted is 0 (greedy) or at least {MIN_TEMPERATURE}"
            )
        if self.top_k < 0:
            raise SettingError(f"top_k is {self.top_k}; accepted is 1 or more, or 0 for off")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p is {self.top_p}; accepted is above 0 and up to 1 (off)")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise SettingError(f"seed is {self.seed}; accepted is 0 to 2^63 - 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise SettingError("top_k and top_p have no effect at temperature 0; set a temperature above 0")

    def generator(self, device: torch.device) -> Generator | None:
        """The source of this request's draws; None when greedy. Draws differ between kinds of device."""
        if self.temperature == 0:
            return None
        generator = Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, choices: Sequence[tuple[SamplingParams, Generator | None]]) -> list[int]:
    """Next token of each row of logits [B, vocabulary], chosen by that row's parameters and generator."""
    tokens = logits.argmax(dim=-1)
    for row, (params, generator) in enumerate(choices):
        if generator is not None:
            tokens[row] = draw(logits[row], params, generator)
    return tokens.tolist()


def draw(logits: Tensor, params: SamplingParams, generator: Generator) -> Tensor:
    """One token id (int64 scalar) from logits [vocabulary]; temperature, then top-k, then top-p."""
    scores = (logits.float() - logits.max()) / params.temperature
    if params.top_k == 0 and params.top_p == 1:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[0]
    scores, tokens = scores.topk(min(params.top_k or len(scores), len(scores)))
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = before >= params.top_p
    outside[0] = False  # the likeliest token stays, however small p is
    probabilities = probabilities.masked_fill(outside, 0)
    return tokens[torch.multinomial(probabilities, 1, generator=generator)[0]]
