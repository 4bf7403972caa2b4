"""One engine, started and measured in this process, for `processes.run_worker`.

The request on stdin is {"engine": "baseline", "vllm" or "transformers", "arguments": of the engine, "dummy":
whether the weights are random, "workloads": [{"prompts": token ids of each, "outputs": tokens to generate after each,
"unmeasured": runs that do not count, "repeats": runs that do}]}. The file RESULT receives {"start_s",
"weights", "runs": [{"repeats": [...], "peak_mem"}]}, in bytes and seconds; a repeat is {"start", "token_times"} and, of
the small engine, {"host_s" (of the median step), "kv_waste", "attention"}.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], list[int]], dict[str, Any]]


def bench(engine: str, workloads: list[dict], **how: Any) -> dict[str, Any]:
    """Starts the engine, then runs each workload as often as it says."""
    start = time.perf_counter()
    starts = {"baseline": start_baseline, "vllm": start_vllm, "transformers": start_transformers}
    generate, read_memory = starts[engine](**how)
    result: dict[str, Any] = {"start_s": time.perf_counter() - start, "runs": []}
    for workload in workloads:
        runs = range(workload["unmeasured"] + workload["repeats"])
        generated = [generate(workload["prompts"], workload["outputs"]) for _ in runs]
        result["weights"], peak = read_memory()
        result["runs"].append({"repeats": generated[workload["unmeasured"] :], "peak_mem": peak})
    return result


def start_baseline(arguments: dict[str, Any], dummy: bool) -> tuple[Generate, Callable[[], tuple[int, int]]]:
    """The small engine; functions that generate and that read (weight bytes, peak bytes of the last generation)."""
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

    def read_memory() -> tuple[int, int]:
        assert engine.metrics is not None
        return engine.metrics.weight_bytes, engine.metrics.peak_mem

    return generate, read_memory


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


def start_transformers(arguments: dict[str, Any], dummy: bool) -> tuple[Generate, Callable[[], tuple[int, int]]]:
    """Hugging Face's `generate`, for requests of one size; functions as those of `start_baseline`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    from rowint8.baseline_engine.metrics import PeakMemory

    folder, dtype = arguments["model"], getattr(torch, arguments["dtype"])
    if dummy:
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
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

    def read_memory() -> tuple[int, int]:
        return sum(parameter.nbytes for parameter in model.parameters()), peak.read()

    return generate, read_memory


def start_vllm(arguments: dict[str, Any], dummy: bool) -> tuple[Generate, Callable[[], tuple[int, int]]]:
    """vLLM, its engine core in a process of its own as always; functions as those of `start_baseline`."""
    from vllm import LLM

    from rowint8.eval.engines.vllm_worker import PROBE, generate

    llm = LLM(**arguments, worker_extension_cls=PROBE, enable_prefix_caching=False, skip_tokenizer_init=True)
    llm.collective_rpc("rowint8_watch")

    def read_memory() -> tuple[int, int]:
        (rank,) = llm.collective_rpc("rowint8_read")
        return rank["weights"], rank["peak_mem"]

    return partial(generate, llm.llm_engine), read_memory
