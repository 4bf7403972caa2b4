"""One engine, started and timed in this process; `speed.run_setup` gives it a process of its own."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], list[int]], dict[str, Any]]
"""(token ids of each prompt, tokens to generate after each) -> {"start": before the first prompt was handed in,
"token_times": for each prompt when each of its tokens came}, in seconds on one clock. The small engine also says
"host_s" (the host's own work in the median step), "kv_waste" and "attention"."""
Read = Callable[[], list[dict[str, Any]]]
"""-> for each rank {"weights": bytes, "peak_mem": bytes since the call before, "compiled": names since then}."""


def bench(engine: str, arguments: dict[str, Any], dummy: bool, workloads: list[dict[str, Any]]) -> dict[str, Any]:
    """Starts the engine, sends one short first request, then runs the workloads in order.

    Args:
        engine: "baseline", "vllm" or "transformers".
        arguments: of the engine.
        dummy: the weights are random.
        workloads: of each {"prompts", "outputs", "unmeasured": runs that do not count, "repeats": runs that do}.

    Returns:
        {"start_s": seconds, "runs": for each workload {"repeats": what `Generate` returns, "ranks": what `Read` does}}.
    """
    start = time.perf_counter()
    starts = {"baseline": start_baseline, "vllm": start_vllm, "transformers": start_transformers}
    generate, read = starts[engine](arguments, dummy)
    start_s = time.perf_counter() - start
    generate(workloads[0]["prompts"][:1], [2])
    read()
    return {"start_s": start_s, "runs": [_run(generate, read, **workload) for workload in workloads]}


def _run(
    generate: Generate, read: Read, prompts: list[list[int]], outputs: list[int], unmeasured: int, repeats: int
) -> dict[str, Any]:
    generated = [generate(prompts, outputs) for _ in range(unmeasured + repeats)]
    return {"repeats": generated[unmeasured:], "ranks": read()}


def start_baseline(arguments: dict[str, Any], dummy: bool) -> tuple[Generate, Read]:
    """The small engine. Its peak is that of the last generation."""
    from rowint8.baseline_engine.engine import Engine, EngineConfig
    from rowint8.baseline_engine.sampler import SamplingParams

    config = EngineConfig(**arguments)
    engine = Engine(config, model=random_model(config) if dummy else None)

    def generate(prompts: list[list[int]], outputs: list[int]) -> dict[str, Any]:
        engine.forget_prefixes()
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in outputs]
        start = time.perf_counter()
        completions = engine.generate(prompts, params)
        steps = engine.times
        return {
            "start": start,
            "token_times": [completion.metrics.token_times for completion in completions],
            "host_s": statistics.median(steps.host),
            "kv_waste": steps.kv_waste,
            "attention": engine.attention_name,
        }

    def read() -> list[dict[str, Any]]:
        assert engine.metrics is not None
        return _one_rank(engine.metrics.weight_bytes, engine.metrics.peak_mem)

    return generate, read


def _one_rank(weights: int, peak_mem: int) -> list[dict[str, Any]]:
    return [{"weights": weights, "peak_mem": peak_mem, "compiled": []}]


def random_model(config: Any) -> Any:
    """A model of the folder's config.json with normal random weights of variance 1 / K, made on the device."""
    import torch

    from rowint8.baseline_engine.model import Decoder
    from rowint8.baseline_engine.model_config import ModelConfig
    from rowint8.baseline_engine.startup import weight_format

    device = config.torch_device()
    model_config = ModelConfig.from_folder(Path(config.model))
    form = weight_format(config, model_config, device)
    model = Decoder(model_config, form)
    torch.manual_seed(0)
    for place in model.places().values():
        weight = torch.ones(place.shape, dtype=form.dtype, device=device)
        place.load(weight.normal_(std=place.shape[-1] ** -0.5) if len(place.shape) == 2 else weight)
    return model


def start_transformers(arguments: dict[str, Any], dummy: bool) -> tuple[Generate, Read]:
    """Hugging Face's `generate`, for requests of one size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    from rowint8.baseline_engine.metrics import PeakMemory

    folder, dtype = arguments["model"], getattr(torch, arguments["dtype"])
    if dummy:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
    peak = PeakMemory(model.device)

    class Clock(BaseStreamer):
        """Notes when each step's tokens come; the first call brings the prompts."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], outputs: list[int]) -> dict[str, Any]:
        (count,), clock, start = set(outputs), Clock(), time.perf_counter()
        peak.reset()
        ids = torch.tensor(prompts)
        length: dict[str, Any] = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False)
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, streamer=clock, **length)
        return {"start": start, "token_times": [clock.times[1:]] * len(prompts)}

    def read() -> list[dict[str, Any]]:
        return _one_rank(sum(parameter.nbytes for parameter in model.parameters()), peak.read())

    return generate, read


def start_vllm(arguments: dict[str, Any], dummy: bool) -> tuple[Generate, Read]:
    """vLLM, its engine core in a process of its own as always. Its arguments say whether the weights are random."""
    from rowint8.eval.engines.probe import probed_llm

    llm = probed_llm(arguments)
    return partial(generate_with_vllm, llm.llm_engine), partial(llm.collective_rpc, "rowint8_read")


def generate_with_vllm(engine: Any, prompts: list[list[int]], outputs: list[int]) -> dict[str, Any]:
    """Hands all prompts in together and steps the engine until each has its greedy tokens; see `Generate`."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    times: dict[str, list[float]] = {str(index): [] for index in range(len(prompts))}
    common: dict[str, Any] = dict(temperature=0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    for name, prompt, count in zip(times, prompts, outputs, strict=True):
        sampling = SamplingParams(max_tokens=count, output_kind=RequestOutputKind.DELTA, **common)
        engine.add_request(name, tokens_input(prompt), sampling)
    while engine.has_unfinished_requests():
        finished = engine.step()
        now = time.perf_counter()
        for output in finished:
            times[output.request_id] += [now] * len(output.outputs[0].token_ids)
    return {"start": start, "token_times": list(times.values())}
