"""One engine, started and measured in this process, for `processes.run_worker`.

The request on stdin is {"llm": arguments of `vllm.LLM`, "workloads": [[batch, prompt tokens, output tokens], ...],
"repeats": n}. The file RESULT receives {"start_s": seconds, "runs": [one object a workload]} in the form that `measure`
describes.
"""

import random
import time
from typing import Any

PROBE = "rowint8.eval.engines.probe.Probe"


def bench(llm: dict[str, Any], workloads: list[list[int]], repeats: int) -> dict[str, Any]:
    """Starts the engine, sends one short first request, then measures the workloads in order."""
    from vllm import LLM

    start = time.perf_counter()
    engine = LLM(**llm, worker_extension_cls=PROBE, enable_prefix_caching=False, skip_tokenizer_init=True)
    start_s = time.perf_counter() - start
    vocab_size = engine.llm_engine.model_config.get_vocab_size()
    engine.collective_rpc("rowint8_watch")
    generate(engine.llm_engine, random_prompts(1, workloads[0][1], vocab_size), [2])
    engine.collective_rpc("rowint8_read")
    runs = [measure(engine, vocab_size, *workload, repeats=repeats) for workload in workloads]
    return {"start_s": start_s, "runs": runs}


def measure(
    engine: Any, vocab_size: int, batch: int, prompt_tokens: int, output_tokens: int, repeats: int
) -> dict[str, Any]:
    """One unmeasured and `repeats` measured generations.

    Returns:
        {"repeats": what `generate` returns, for each, "ranks": what the probe reads on each rank}.
    """
    prompts = random_prompts(batch, prompt_tokens, vocab_size)
    outputs = [output_tokens] * batch
    generations = [generate(engine.llm_engine, prompts, outputs) for _ in range(1 + repeats)]
    return {"repeats": generations[1:], "ranks": engine.collective_rpc("rowint8_read")}


def generate(engine: Any, prompts: list[list[int]], outputs: list[int]) -> dict[str, Any]:
    """Hands all prompts in together and steps the engine until each has as many greedy tokens as `outputs` says.

    Returns:
        {"start": before the first prompt was handed in, "token_times": for each prompt when each of its tokens came
        back}, in seconds on one clock.
    """
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


def random_prompts(batch: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """The same for every setup."""
    draw = random.Random(f"{batch} {tokens}")
    return [[draw.randrange(vocab_size) for _ in range(tokens)] for _ in range(batch)]
