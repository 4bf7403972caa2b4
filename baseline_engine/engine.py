"""The engine: prompts in, completions out.

`add` hands in a request, `step` moves all of them on by one run of the model: schedule, launch, record. `generate` does
so until its prompts are complete. On a GPU a step is launched before the tokens of the one before it are read, so that
the host prepares step n + 1 while the device computes step n; a request that turns out to have ended in step n then
computed one token too many, which is dropped.
"""

from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from rowint8.baseline_engine import startup
from rowint8.baseline_engine.block_pool import BlockPool
from rowint8.baseline_engine.config import EngineConfig, SamplingParams
from rowint8.baseline_engine.errors import EngineError, shown
from rowint8.baseline_engine.metrics import PeakMemory, RunMetrics, StepTimes
from rowint8.baseline_engine.model import Decoder
from rowint8.baseline_engine.progress import progress_bar
from rowint8.baseline_engine.prompts import Prompt, encode
from rowint8.baseline_engine.request import Completion, Request, TokenEvent
from rowint8.baseline_engine.runner import StepResult
from rowint8.baseline_engine.sampler import NOT_FINITE, SamplingState
from rowint8.baseline_engine.scheduler import Scheduler
from rowint8.baseline_engine.tokenizer import TextOutput, Tokenizer


class Engine:
    """A loaded model that completes prompts.

    `metrics` holds the `RunMetrics` of the last `generate`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: bool = False,
        model: Decoder | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        """Loads the model, unless one is given, and prepares to run it; `progress` shows bars on a terminal.

        Raises:
            EngineError: the model, or a setting, is none that the engine can run, or memory does not suffice.
        """
        start = perf_counter()
        self.config, self.progress = config, progress
        if model is None:
            model, tokenizer = startup.load(config, progress)
        self.model, self.model_config, self.tokenizer = model, model.config, tokenizer
        self.device = model.weight_format.device
        self.load_seconds = perf_counter() - start
        self.runner, self.compile_seconds = startup.make_runner(model, config)
        self.context = self.runner.context
        pool = BlockPool(self.runner.cache.num_blocks, config.block_size)
        self.scheduler = Scheduler(pool, config.max_seqs, config.max_batch_tokens, config.prefix_caching)
        self.overlap = self.device.type == "cuda" if config.overlap is None else config.overlap
        self.times = StepTimes()
        self.metrics: RunMetrics | None = None
        self._in_flight: StepResult | None = None
        self._torn = False
        """True within a step, and after one that was broken off."""

    @property
    def attention_name(self) -> str:
        return self.runner.attention.name

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self._in_flight)

    def add(self, prompt: Prompt, params: SamplingParams, *, chat: bool = False, index: int = 0) -> Request:
        """Hands in one request; `index` is what its events are called by.

        Raises:
            EngineError: the prompt is empty, too long or holds what the model does not know; no other is disturbed.
        """
        request = self.make_request(prompt, params, chat=chat, index=index)
        self._mend()
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        """Ends a request and takes its memory back; nothing where it has ended already."""
        self._mend()
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self.scheduler.finish(request)

    def abort_all(self) -> None:
        """Ends every request; the tokens of a step in flight are dropped."""
        self._abort(self.scheduler.requests)

    def _abort(self, requests: Sequence[Request]) -> None:
        """Ends the requests, then records the step in flight, of which they get no token."""
        for request in requests:
            self.abort(request)
        if self._in_flight:
            self._torn = True
            self._record(self._in_flight)
            self._in_flight = None
            self._torn = False

    def _mend(self) -> None:
        """After a step that was broken off, by an interrupt say: ends every request and empties the cache."""
        if self._torn:
            for request in self.scheduler.requests:
                request.finish_reason = request.finish_reason or "abort"
            self._in_flight = None
            self.scheduler.reset()
            self._torn = False

    def step(self) -> list[TokenEvent]:
        """Moves every request that can run on by one step; the tokens that reached the host."""
        self._mend()
        self._torn = True
        self.times.host.append(0.0)
        with self.times.measure("schedule"):
            chunks = self.scheduler.schedule()
        computed = sum(chunk.count for chunk in chunks)
        self.times.count(computed, self.scheduler.num_slots, self.scheduler.num_filled + computed)
        launched, events = None, []
        if chunks:
            try:
                with self.times.measure("launch"):
                    launched = self.runner.launch(chunks)
                self.scheduler.commit(chunks)
            except (torch.OutOfMemoryError, MemoryError) as error:
                request = max(chunks, key=lambda chunk: chunk.count).request
                details = str(error).splitlines()[0] if str(error) else "no details"
                events.append(self._give_up(request, f"out of memory: {details}"))
                torch.cuda.empty_cache()
        if self.overlap:
            launched, self._in_flight = self._in_flight, launched
        events += self._record(launched) if launched else []
        self._torn = False
        return events

    def _record(self, result: StepResult) -> list[TokenEvent]:
        with self.times.measure("wait"):
            rows = result.read()
        now, events = perf_counter(), []
        with self.times.measure("record"):
            for request, token, logprobs in rows:
                if request.finish_reason is not None:  # it ended while this step was in flight
                    continue
                if token == NOT_FINITE:
                    events.append(self._give_up(request, explain_not_finite(self.model.weight_format.dtype)))
                    continue
                try:
                    request.append(token, now)
                except EngineError as error:  # the tokenizer fails on its text
                    events.append(self._give_up(request, str(error)))
                    continue
                if logprobs:
                    request.logprobs.append(logprobs)
                if request.finish_reason is not None:
                    self.scheduler.finish(request)
                events.append(TokenEvent(request.index, token, request.take_text(), request.finish_reason, logprobs))
        return events

    def _give_up(self, request: Request, error: str) -> TokenEvent:
        """Fails one request; the others go on."""
        request.end("error", error)
        self.scheduler.finish(request)
        return TokenEvent(request.index, None, request.take_text(), "error", error=error)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
        *,
        chat: bool = False,
        on_token: Callable[[TokenEvent], None] | None = None,
    ) -> list[Completion]:
        """Completes the prompts together; one `SamplingParams` for all or one for each.

        Args:
            chat: text prompts are a user's messages, put into the model's chat template.
            on_token: called with every new token as it comes.

        Raises:
            EngineError: a prompt is empty or longer than the context. All are checked before any work is done.
        """
        peak = PeakMemory(self.device)
        peak.reset()
        start, self.times = perf_counter(), StepTimes()
        requests = self._requests(prompts, sampling, chat, start)
        try:
            self._run(requests, on_token)
        except BaseException:  # an interrupt, or what on_token raises
            self._abandon(requests)
            raise
        wall = perf_counter() - start
        completions = [self.complete(request) for request in requests]
        self.metrics = RunMetrics(
            requests=tuple(completion.metrics for completion in completions),
            wall=wall,
            peak_mem=peak.read() - (self.runner.cache.data.nbytes if self.device.type == "cuda" else 0),
            weight_bytes=self.model.weight_bytes,
            load_seconds=self.load_seconds,
            compile_seconds=self.compile_seconds,
            steps=self.times,
        )
        return completions

    def _abandon(self, requests: Sequence[Request]) -> None:
        try:
            self._abort(requests)
        finally:
            self._mend()  # where this was interrupted, too

    def _run(self, requests: Sequence[Request], on_token: Callable[[TokenEvent], None] | None) -> None:
        for request in requests:
            self.scheduler.add(request)
        with progress_bar("generating", len(requests), self.progress and on_token is None) as advance:
            while self.has_work:
                for event in self.step():
                    if on_token:
                        on_token(event)
                    if event.finish_reason:
                        advance()

    def _requests(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams], chat: bool, start: float
    ) -> list[Request]:
        if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes) or not prompts:
            raise EngineError("prompts must be a list of at least one prompt")
        if not isinstance(sampling, SamplingParams | Sequence):
            raise EngineError(f"sampling parameters are {shown(sampling)}; give a SamplingParams, or a list of them")
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise EngineError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one for each"
            )
        pairs = enumerate(zip(prompts, params, strict=True))
        requests = [self.make_request(prompt, param, chat=chat, index=index) for index, (prompt, param) in pairs]
        for request in requests:
            request.start = start  # tokenizing the others is part of the wait
        return requests

    def make_request(self, prompt: Prompt, params: SamplingParams, *, chat: bool = False, index: int = 0) -> Request:
        """Checks a request without handing it in; raises as `add` does."""
        start = perf_counter()
        if not isinstance(params, SamplingParams):
            raise EngineError(f"sampling parameters are {shown(params)}; give a SamplingParams")
        self._check_size(prompt, index)
        token_ids = self.encode(prompt, chat=chat)
        if not token_ids:
            raise EngineError(f"prompt {index + 1} is empty; at least one token is needed")
        if len(token_ids) >= self.context:
            most = self.context - 1
            raise EngineError(f"prompt {index + 1} has {len(token_ids)} tokens; the context takes up to {most}")
        if params.stop and self.tokenizer is None:
            raise EngineError("the model has no tokenizer files, which stop strings need; give stop_token_ids")
        last = self.model_config.vocab_size - 1
        if (stop_id := max(params.stop_token_ids, default=0)) > last:
            raise EngineError(f"stop_token_ids holds {shown(stop_id)}; the vocabulary is 0 to {last}")
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        return Request(
            index=index,
            tokens=token_ids,
            num_prompt=len(token_ids),
            sampling=SamplingState(params),
            max_tokens=min(params.max_tokens, self.context - len(token_ids)),
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            text=TextOutput(self.tokenizer.stream(), params.stop) if self.tokenizer else None,
            start=start,
        )

    def _check_size(self, prompt: Prompt, index: int) -> None:
        """A text of 20 MB takes a tokenizer 40 seconds and 4 GB of memory."""
        if self.tokenizer and isinstance(prompt, str) and len(prompt) > self.context * self.tokenizer.longest:
            raise EngineError(
                f"prompt {index + 1} has {len(prompt)} characters; the context takes up to {self.context - 1} tokens, "
                f"of at most {self.tokenizer.longest} characters"
            )

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt, checked; see `prompts.encode`."""
        return encode(prompt, chat, self.tokenizer, self.model_config.vocab_size)

    def forget_prefixes(self) -> None:
        """Empties the prefix cache, so that the next prompts are computed in full."""
        self.scheduler.pool.forget_contents()

    def complete(self, request: Request) -> Completion:
        """What became of a request that has ended."""
        return request.completion()


def explain_not_finite(dtype: torch.dtype) -> str:
    """The error where NaN or infinity came out of the model, which a dtype of a larger range may mend."""
    name = str(dtype).removeprefix("torch.")
    wider = {"float16": "give dtype bfloat16 or float32", "bfloat16": "give dtype float32"}
    advice = wider.get(name, "the weights or numbers in config.json are at fault")
    return f"the model's logits are NaN or infinite in {name}; {advice}"
