"""Decode steps of one engine, timed and profiled in this process; `profile.run_setup` gives it a process of its own."""

import asyncio
import gc
import itertools
import time
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rowint8.eval.engines.parts import Interval, device_work, longest, operator_work, part_ms

WARM_TOKENS = 8
"""Tokens that each request has before the steps that count."""


class Running(Protocol):
    """An engine whose steps are taken one by one."""

    weights: int
    """Bytes of all of the model's."""
    attention: str | None
    """As in `ProfileRow`."""

    def begin(self, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> None:
        """Hands the prompts in and steps until each has WARM_TOKENS."""
        ...

    def step(self) -> None: ...

    def lengths(self) -> list[int]:
        """Tokens of each request so far, its prompt's included."""
        ...

    def end(self) -> None:
        """Drops the requests."""
        ...

    def host(self, run: dict[str, Any], steps: int) -> dict[str, Any]:
        """What only the small engine can tell: "host_ms", "served_ms", "padding" and "kv_waste" of `ProfileRow`."""
        ...


def measure(engine: str, arguments: dict[str, Any], dummy: bool, runs: list[dict], steps: int) -> dict[str, Any]:
    """Starts the engine and measures each run: first all without the profiler, which once started slows launches.

    Args:
        engine: "baseline" or "vllm".
        arguments: of `EngineConfig` or `vllm.LLM`.
        dummy: the weights are random.
        runs: of each {"prompts": token ids, "tokens": how many to ask for after each, "sampling": arguments of
            `SamplingParams`}.
        steps: how many count.

    Returns:
        {"weights": bytes, "read_tb_s": what the card reads at best, None on the CPU, "attention", "runs": for each what
        `timed` and `profiled` return}.
    """
    read_tb_s = _read_ceiling()
    running: Running = (Baseline if engine == "baseline" else Vllm)(arguments, dummy)
    found = [timed(running, run, steps) for run in runs]
    for run, result in zip(runs, found, strict=True):
        result |= profiled(running, run, steps, result["step_ms"])
    facts = {"weights": running.weights, "attention": running.attention}
    return {**facts, "read_tb_s": read_tb_s, "runs": found}


def timed(running: Running, run: dict[str, Any], steps: int) -> dict[str, Any]:
    """ "step_ms", "context" (mean tokens that a request attends to), and what `Running.host` returns."""
    running.begin(**run)
    context = fmean(running.lengths()) + steps / 2
    step_ms = _advance(running, steps)
    host = running.host(run, steps)
    return {"step_ms": step_ms, "context": round(context), **host}


def profiled(running: Running, run: dict[str, Any], steps: int, step_ms: float) -> dict[str, Any]:
    """ "profiled_ms", "parts_ms", "longest_ms" and "launches" (kernels or operators a step) of as many steps again.

    Gaps are what the parts leave of `step_ms` on CUDA, where the profiler lengthens no kernel, only the gaps; on the
    CPU it slows the operators down, and they are what is left of the profiled step.
    """
    cuda = torch.cuda.is_available()
    running.begin(**run)
    _synchronize()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        profiled_ms = _advance(running, steps)
        _synchronize()
    running.end()
    events = profiler.events() or []
    work = device_work(_kernels(events)) if cuda else operator_work(events)
    parts = part_ms(work, steps, step_ms if cuda else profiled_ms)
    return {
        "profiled_ms": profiled_ms,
        "parts_ms": parts,
        "longest_ms": longest(work, steps),
        "launches": len(work) / steps,
    }


def _advance(running: Running, steps: int) -> float:
    """Milliseconds of each of so many steps, on average.

    Raises:
        RuntimeError: not every request gained a token a step (one more or less at the ends of an overlapped run).
    """
    before, start = running.lengths(), time.perf_counter()
    for _ in range(steps):
        running.step()
    wall = time.perf_counter() - start
    gained = [now - then for now, then in zip(running.lengths(), before, strict=True)]
    if min(gained) < steps - 1 or max(gained) > steps + 1:
        raise RuntimeError(
            f"in {steps} steps the requests gained {sorted(set(gained))} tokens: too many for the cache?"
        )
    return wall / steps * 1000


def _kernels(events: Any) -> list[Interval]:
    """What ran on the device; ranges that somebody named are no work of it."""
    on_device = (event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    return [Interval(event.name, event.time_range.start, event.time_range.end) for event in on_device]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _read_ceiling() -> float | None:
    if not torch.cuda.is_available():
        return None
    from rowint8.eval.kernels.timing import measure_ceilings

    rate = measure_ceilings().read_tb_s
    gc.collect()
    torch.cuda.empty_cache()  # the engine takes what is free
    return rate


class Baseline:
    """The small engine."""

    weights: int
    attention: str | None

    def __init__(self, arguments: dict[str, Any], dummy: bool) -> None:
        from rowint8.baseline_engine.engine import Engine, EngineConfig
        from rowint8.baseline_engine.tokenizer import Tokenizer
        from rowint8.eval.engines.speed_worker import random_model

        config = EngineConfig(**arguments)
        made: dict[str, Any] = {}
        if dummy:
            made = {"model": random_model(config), "tokenizer": Tokenizer(Path(config.model))}
        self._engine = Engine(config, **made)
        self.weights, self.attention = self._engine.model.weight_bytes, self._engine.attention_name

    def begin(self, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> None:
        from rowint8.baseline_engine.metrics import StepTimes
        from rowint8.baseline_engine.sampler import SamplingParams

        self._engine.forget_prefixes()
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
        self._requests = [self._engine.add(prompt, params, index=index) for index, prompt in enumerate(prompts)]
        while any(len(request.token_times) < WARM_TOKENS for request in self._requests):
            self.step()
        self._engine.times = StepTimes()

    def step(self) -> None:
        self._engine.step()

    def lengths(self) -> list[int]:
        return [len(request.tokens) for request in self._requests]

    def end(self) -> None:
        self._engine.abort_all()

    def host(self, run: dict[str, Any], steps: int) -> dict[str, Any]:
        times, batch = self._engine.times, len(self._requests)
        host_ms = {part: seconds / times.steps * 1000 for part, seconds in times.seconds.items()}
        if self._engine.tokenizer:
            host_ms["detokenize"] = self._detokenize_ms()
        self.end()
        graphs = self._engine.runner.decode_graphs
        rows = next((graph.rows for graph in graphs if graph.rows >= batch), batch)
        return {
            "host_ms": host_ms,
            "kv_waste": times.kv_waste,
            "padding": 1 - batch / rows,
            "served_ms": asyncio.run(self._served_ms(run, steps)),
        }

    def _detokenize_ms(self) -> float:
        """Turning one more token of each request into text, which is a part of recording, measured by itself."""
        from rowint8.baseline_engine.tokenizer import TextOutput

        assert self._engine.tokenizer is not None
        outputs = [request.output_ids for request in self._requests]
        start = time.perf_counter()
        for output in outputs:
            text = TextOutput(self._engine.tokenizer.stream(), ())
            for token in output:
                text.push(token)
                text.take(last=False)
        return (time.perf_counter() - start) / len(outputs[0]) * 1000

    async def _served_ms(self, run: dict[str, Any], steps: int) -> float:
        """A step's time where each request is a coroutine of its own that waits for its tokens."""
        from rowint8.baseline_engine.extras.async_engine import AsyncEngine
        from rowint8.baseline_engine.sampler import SamplingParams

        params = SamplingParams(max_tokens=run["tokens"], ignore_eos=True, **run["sampling"])
        self._engine.forget_prefixes()

        async def gap(prompt: list[int]) -> float:
            times = [time.perf_counter() async for _ in server.stream(prompt, params)]
            return (times[-1] - times[-1 - steps]) / steps

        async with AsyncEngine(self._engine) as server:
            return fmean(await asyncio.gather(*map(gap, run["prompts"]))) * 1000


class Vllm:
    """vLLM, stepped in this process. It tells nothing of its host's work."""

    weights: int
    attention: str | None

    def __init__(self, arguments: dict[str, Any], dummy: bool) -> None:
        from rowint8.eval.engines.probe import probed_llm

        llm = probed_llm(arguments)
        (rank,) = llm.collective_rpc("rowint8_read")
        self.weights, self.attention = rank["weights"], None
        self._engine: Any = llm.llm_engine
        self._names = map(str, itertools.count())
        self._lengths: dict[str, int] = {}

    def begin(self, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        common: dict[str, Any] = dict(ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        params = SamplingParams(**{"temperature": 0, "max_tokens": tokens, **common, **sampling})
        self._lengths = {name: len(prompt) for name, prompt in zip(self._names, prompts, strict=False)}
        for name, prompt in zip(self._lengths, prompts, strict=True):
            self._engine.add_request(name, tokens_input(prompt), params)
        while any(now < len(prompt) + WARM_TOKENS for now, prompt in zip(self.lengths(), prompts, strict=True)):
            self.step()

    def step(self) -> None:
        for output in self._engine.step():
            self._lengths[output.request_id] += len(output.outputs[0].token_ids)

    def lengths(self) -> list[int]:
        return list(self._lengths.values())

    def end(self) -> None:
        self._engine.abort_request(list(self._lengths))
        while self._engine.has_unfinished_requests():
            self.step()

    def host(self, run: dict[str, Any], steps: int) -> dict[str, Any]:
        self.end()
        return dict.fromkeys(("host_ms", "kv_waste", "padding", "served_ms"))
