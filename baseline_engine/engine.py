"""The engine: prompts in, completions out.

Each prompt is prefilled alone, without padding; then all are decoded together, one token a step, each row with its own
position and mask. A row that has finished keeps its place and is computed along (its tokens are dropped) until the
batch ends: shapes stay the same from step to step, which is what a compiled decode step wants.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from rowint8.baseline_engine.checkpoint import load_model, resolve_folder
from rowint8.baseline_engine.config import EngineConfig, ModelConfig
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.layers import WeightFormat
from rowint8.baseline_engine.metrics import PeakMemory, RequestMetrics, RunMetrics
from rowint8.baseline_engine.model import DecoderLayer
from rowint8.baseline_engine.request import Completion, Request, TokenEvent
from rowint8.baseline_engine.sampler import SamplingParams, sample
from rowint8.baseline_engine.tokenizer import TextStream, Tokenizer, has_tokenizer

Prompt = str | Sequence[int]

_COMPILED_LENGTH_STEP = 64
"""In compile mode the cache's length is rounded up to a multiple of this, so that like requests share one graph."""
_MAX_GRAPHS = 64
"""Compiled graphs of the decoder layer kept in one process, one a shape (torch's own limit is 8)."""


@dataclass
class Batch:
    """Requests that are served together."""

    requests: list[Request]
    cache: KvCache
    waiting: deque[Request]
    """Not yet prefilled."""

    @property
    def running(self) -> list[Request]:
        return [request for request in self.requests if request.finish_reason is None]


class Engine:
    """A loaded model that completes prompts.

    `metrics` holds the `RunMetrics` of the last `generate`.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False):
        """Loads the model; `progress` shows a bar on a terminal.

        Raises:
            EngineError: the model, or a setting, is none that the engine can run.
        """
        start = perf_counter()
        self.config = config
        self.device = config.torch_device()
        folder = resolve_folder(config.model)
        self.model_config = ModelConfig.from_folder(folder)
        self.model = load_model(folder, self.model_config, self._weight_format(), progress=progress)
        self.tokenizer = Tokenizer(folder) if has_tokenizer(folder) else None
        self._decode_layer = DecoderLayer.forward
        if config.mode == "compile":
            self._decode_layer = torch.compile(DecoderLayer.forward, fullgraph=True, dynamic=False)
        self._compiled_shapes: set[tuple[int, int]] = set()
        self.metrics: RunMetrics | None = None
        self.load_seconds = perf_counter() - start

    def _weight_format(self) -> WeightFormat:
        config, bias = self.config, self.model_config.mlp_bias
        if config.fused and bias:
            raise EngineError("this model's MLP has a bias, which the fused SwiGLU has not; give --no-fused")
        int8 = config.quantization == "rowint8"
        fused = int8 and not bias if config.fused is None else config.fused
        return WeightFormat(config.torch_dtype(self.model_config), self.device, int8, fused)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
        *,
        chat: bool = False,
        on_token: Callable[[TokenEvent], None] | None = None,
    ) -> list[Completion]:
        """Completes the prompts (text, or token ids) together; one `SamplingParams` for all or one for each.

        Args:
            chat: text prompts are a user's messages, put into the model's chat template.
            on_token: called with every new token as it comes.

        Raises:
            EngineError: a prompt is empty or longer than the context. All are checked before any work is done.
        """
        peak = PeakMemory(self.device)
        peak.reset()
        start = perf_counter()
        batch = self._admit(prompts, sampling, chat)
        compile_seconds = self._warm_up(batch.cache)
        start += compile_seconds  # no request waits for the compiler: the clock stands still meanwhile
        streams = self._streams(batch) if on_token else None
        while batch.running:
            for request in self.step(batch):
                if on_token and streams is not None:
                    on_token(_event(request, streams[request.index]))
        wall = perf_counter() - start
        completions = [self._complete(request, start) for request in batch.requests]
        self.metrics = RunMetrics(
            requests=tuple(completion.metrics for completion in completions),
            wall=wall,
            peak_mem=peak.read(),
            weight_bytes=self.model.weight_bytes,
            load_seconds=self.load_seconds,
            compile_seconds=compile_seconds,
        )
        return completions

    def step(self, batch: Batch) -> list[Request]:
        """Runs the model once, samples, records: one prompt is prefilled, or every running request gets a token.

        Returns the requests that got a token.
        """
        if batch.waiting:
            requests = [batch.waiting.popleft()]
            logits = self._prefill(requests[0], batch.cache)
        else:
            requests = batch.running
            logits = self._decode(batch)
            if len(requests) < len(batch.requests):
                logits = logits[[request.index for request in requests]]
        tokens = sample(logits, [(request.params, request.generator) for request in requests])
        now = perf_counter()
        for request, token in zip(requests, tokens, strict=True):
            request.append(token, now)
        return requests

    def _prefill(self, request: Request, cache: KvCache) -> Tensor:
        """Logits [1, vocabulary] after the whole prompt, whose keys and values enter the request's row."""
        tokens = torch.tensor([request.prompt_ids], device=self.device)
        positions = torch.arange(tokens.shape[1], device=self.device)[None]
        hidden = self.model(tokens, positions, cache.row(request.index), mask=None)
        return self.model.logits(hidden[:, -1])

    def _decode(self, batch: Batch) -> Tensor:
        """Logits [B, vocabulary] after the newest token of each row."""
        newest = [[request.output_ids[-1]] for request in batch.requests]
        positions = [[request.last_position] for request in batch.requests]
        longest = max(request.last_position for request in batch.running) + 1
        length = batch.cache.length if self.config.mode == "compile" else longest
        return self._decode_step(torch.tensor(newest), torch.tensor(positions), batch.cache, length)

    def _decode_step(self, tokens: Tensor, positions: Tensor, cache: KvCache, length: int) -> Tensor:
        """Tokens and positions [B, 1] -> logits [B, vocabulary]; looks at the first `length` entries of the cache."""
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        hidden_entries = torch.arange(length, device=self.device) > positions  # [B, length]
        mask = torch.zeros_like(hidden_entries, dtype=self.model.form.dtype)
        mask = mask.masked_fill(hidden_entries, -torch.inf)[:, None, None]
        hidden = self.model(tokens, positions, cache, mask, self._decode_layer)
        return self.model.logits(hidden[:, -1])

    def _warm_up(self, cache: KvCache) -> float:
        """Compiles the decode step for this cache's shape unless that is done; returns the seconds it took."""
        shape = (cache.num_rows, cache.length)
        if self.config.mode == "eager" or shape in self._compiled_shapes:
            return 0.0
        start = perf_counter()
        tokens = torch.zeros((cache.num_rows, 1), dtype=torch.int64)
        with torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS):
            # Writes position 0 of every row, which each prompt then overwrites.
            self._decode_step(tokens, tokens, cache, cache.length)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._compiled_shapes.add(shape)
        return perf_counter() - start

    def _admit(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams], chat: bool
    ) -> Batch:
        """Checks every prompt and allocates the cache."""
        if isinstance(prompts, str) or not prompts:
            raise EngineError("prompts must be a list of at least one prompt")
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise EngineError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one for each"
            )
        pairs = zip(prompts, params, strict=True)
        requests = [self._request(index, prompt, param, chat) for index, (prompt, param) in enumerate(pairs)]
        length = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        if self.config.mode == "compile":
            length = -(-length // _COMPILED_LENGTH_STEP) * _COMPILED_LENGTH_STEP
        form = self.model.form
        cache = KvCache.allocate(self.model_config, len(requests), length, form.dtype, form.device)
        return Batch(requests, cache, deque(requests))

    def _request(self, index: int, prompt: Prompt, params: SamplingParams, chat: bool) -> Request:
        token_ids = self.encode(prompt, chat=chat)
        context = self.model_config.max_position_embeddings
        if not token_ids:
            raise EngineError(f"prompt {index + 1} is empty; at least one token is needed")
        if len(token_ids) >= context:
            raise EngineError(f"prompt {index + 1} has {len(token_ids)} tokens; the context takes up to {context - 1}")
        return Request(
            index=index,
            prompt_ids=token_ids,
            params=params,
            max_tokens=min(params.max_tokens, context - len(token_ids)),
            eos_token_ids=frozenset(self.model_config.eos_token_ids),
            generator=params.generator(self.device),
        )

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; ids given as such are checked.

        Raises:
            EngineError: text without a tokenizer, `chat` without a template or with ids, an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise EngineError(f"{self.config.model} has no tokenizer files; give the prompt as token ids")
            return self.tokenizer.encode(prompt, chat=chat)
        if chat:
            raise EngineError("a chat message must be text; give the prompt as text, or leave chat out")
        vocabulary = self.model_config.vocab_size
        for token_id in prompt:
            if not 0 <= token_id < vocabulary:
                raise EngineError(f"prompt holds token id {token_id}; the vocabulary is 0 to {vocabulary - 1}")
        return list(prompt)

    def _streams(self, batch: Batch) -> list[TextStream | None]:
        return [self.tokenizer.stream() if self.tokenizer else None for _ in batch.requests]

    def _complete(self, request: Request, start: float) -> Completion:
        assert request.finish_reason is not None
        text = self.tokenizer.decode(request.output_ids) if self.tokenizer else ""
        metrics = RequestMetrics(len(request.prompt_ids), start, tuple(request.token_times))
        return Completion(text, request.output_ids, request.finish_reason, metrics)


def _event(request: Request, stream: TextStream | None) -> TokenEvent:
    token_id = request.output_ids[-1]
    text = stream.step(token_id) if stream else ""
    return TokenEvent(request.index, token_id, text, request.finish_reason)
