"""One prompt on its way to becoming a completion, and what the caller gets of it."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rowint8.baseline_engine.block_pool import block_key
from rowint8.baseline_engine.metrics import RequestMetrics
from rowint8.baseline_engine.sampler import SamplingState, TokenLogprobs
from rowint8.baseline_engine.tokenizer import TextOutput

FinishReason = Literal["stop", "length", "error", "abort"]


class TokenEvent(NamedTuple):
    """One new token, as handed to `on_token`; or the end of a request that failed, without a token."""

    request: int
    """Index of the prompt (`Request.index`)."""
    token_id: int | None
    """None in the event of an error."""
    text: str
    """The text that this token completes, maybe none (it may begin a stop string); empty without a tokenizer."""
    finish_reason: FinishReason | None
    """"stop" at an end-of-sequence or stop token or a stop string, "length" at max_tokens or the end of the context,
    "error" where the engine had to give up on this request, else None."""
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    """Why the engine gave up on the request."""


@dataclass(frozen=True)
class Completion:
    """What became of one prompt."""

    text: str
    """Without special tokens and without the stop string; empty without a tokenizer."""
    token_ids: list[int]
    """The token that ended it included."""
    finish_reason: FinishReason
    metrics: RequestMetrics
    logprobs: list[TokenLogprobs] | None = None
    """One entry a token, where `SamplingParams.logprobs` asked for them."""
    error: str | None = None


@dataclass(eq=False)
class Request:
    """The state of one prompt: its tokens, which of them are computed, and where their keys and values are."""

    index: int
    tokens: list[int]
    """Prompt and output."""
    num_prompt: int
    sampling: SamplingState
    max_tokens: int
    """`params.max_tokens`, clipped so that prompt and output fit the context."""
    stop_ids: frozenset[int]
    text: TextOutput | None
    start: float
    """When it was handed in (`time.perf_counter`)."""

    blocks: list[int] = field(default_factory=list)
    """The block table: token p stands in block p // block_size at p % block_size."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache, or on their way there."""
    num_pending: int = 0
    """Tokens that the device has chosen, or is about to, and the host has not seen yet."""
    sampled_row: int = 0
    """Where in the last batch's sampled tokens the newest pending one is."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of the full blocks of known tokens, as far as needed so far; see `block_key`."""
    num_published: int = 0

    token_times: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_tokens(self) -> int:
        """Known and pending."""
        return len(self.tokens) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the model has still to see; 0 where the last token allowed is already on its way."""
        if self.num_tokens - self.num_prompt >= self.max_tokens:
            return 0
        return self.num_tokens - self.num_computed

    def key(self, index: int, block_size: int) -> bytes:
        """The key of the full block `index`, all of whose tokens must be known."""
        while len(self.keys) <= index:
            start = len(self.keys) * block_size
            previous = self.keys[-1] if self.keys else b""
            self.keys.append(block_key(previous, self.tokens[start : start + block_size]))
        return self.keys[index]

    def append(self, token_id: int, time: float) -> None:
        """Records a new token and whether it is the last."""
        self.num_pending -= 1
        self.tokens.append(token_id)
        self.token_times.append(time)
        stopped = self.text is not None and self.text.push(token_id)
        if stopped or token_id in self.stop_ids:
            self.end("stop")
        elif len(self.tokens) - self.num_prompt >= self.max_tokens:
            self.end("length")

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """No token follows: the text is complete, in which a stop string may come to light."""
        stopped = self.text is not None and self.text.close()
        self.finish_reason = "stop" if stopped and reason == "length" else reason
        self.error = error

    def take_text(self) -> str:
        """The text since the last call."""
        return self.text.take(self.finish_reason is not None) if self.text else ""

    def completion(self) -> Completion:
        """What the caller gets of a request that has ended."""
        assert self.finish_reason is not None
        metrics = RequestMetrics(self.num_prompt, self.start, tuple(self.token_times))
        logprobs = self.logprobs if self.sampling.params.logprobs is not None else None
        text = self.text.text if self.text else ""
        return Completion(text, self.output_ids, self.finish_reason, metrics, logprobs, self.error)
