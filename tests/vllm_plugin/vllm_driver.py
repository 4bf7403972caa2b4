"""Runs vLLM engines in a process of its own, for test_vllm_*.py: a job per line of stdin, a result per line of stdout.

A job is {"model": folder, "llm": arguments of `LLM`, "prompts": token ids, "sampling": arguments of `SamplingParams`}
and, where wanted,

    triton         whether the CPU runs the Triton kernel
    load_memory    whether to measure what loading takes
    reload         folder of the weights to load after the model's own
    sleep          level of a sleep between two generations
    save           folder for `save_sharded_state`
    lora           folder of an adapter for all prompts
    classify       whether the model is asked for probabilities of classes, not for tokens
    tie_by_weight  whether models tie their head as many did before vLLM 0.32

A result is {"token_ids", "logprobs", "prompt_logprobs", "layers" (see `describe_layers`), "triton_calls",
"swiglu_calls", "norm_calls", "int8_calls" (of each operator of INT8 activations)} and, where they apply,

    ranks         the layers of every rank
    same_memory   whether every weight stayed where it was in a reload or a sleep
    before_sleep  token ids of the generation before the sleep
    load_memory   bytes of tensors: "peak" while loading, "final" of the model
    probabilities of the classes, for every prompt, in place of tokens and log-probabilities

or {"error": messages of the exception and its causes}. What vLLM prints goes to stderr.
"""

import gc
import hashlib
import importlib
import json
import os
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import torch


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_run_guarded(json.loads(line))), file=results, flush=True)


def _run_guarded(job: dict) -> dict:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.freeze()  # what is imported: vLLM's many collections need not look through it; they thaw it at an engine's end
    stance = "force_eager" if job["llm"].get("enforce_eager") else "default"
    try:
        with torch.compiler.set_stance(stance):  # vLLM compiles a part of its sampler even in eager mode
            return _run(job)
    except Exception as error:
        return {"error": "\n".join(_messages(error))}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()


def _messages(error: BaseException | None) -> list[str]:
    return [] if error is None else [str(error), *_messages(error.__cause__ or error.__context__)]


def _run(job: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from rowint8.kernels import cpu, cpu_int8

    triton = _use_triton() if job.get("triton") else None
    swiglu, norm = _Counted("swiglu", cpu.swiglu), _Counted("add_rms_norm", cpu.add_rms_norm)
    of_int8 = {f"{name}_int8": getattr(cpu_int8, name) for name in ("linear", "swiglu", "add_rms_norm")}
    of_int8["quantize_tokens"] = cpu_int8.quantize_tokens
    int8 = {name: _Counted(name, launch) for name, launch in of_int8.items()}
    memory = {}
    with _patches(job, memory):
        llm = LLM(job["model"], **job["llm"])
    sampling = SamplingParams(**job.get("sampling", {}))
    lora = LoRARequest("adapter", 1, job["lora"]) if job.get("lora") else None
    prompts = [{"prompt_token_ids": ids} for ids in job.get("prompts", [])]
    result = {"load_memory": memory} if memory else {}
    if job.get("sleep"):
        result["before_sleep"] = _token_ids(llm.generate(prompts, sampling))
    if job.get("sleep") or job.get("reload"):
        before = llm.apply_model(weight_addresses)
        if job.get("sleep"):
            _sleep_and_wake(llm, job["sleep"])
        else:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
        result["same_memory"] = llm.apply_model(weight_addresses) == before
    if job.get("save"):
        llm.llm_engine.engine_core.save_sharded_state(path=job["save"])
    if job.get("classify"):
        outputs, result["probabilities"] = [], [output.outputs.probs for output in llm.classify(prompts)]
    else:
        outputs = llm.generate(prompts, sampling, lora_request=lora)
    ranks = llm.apply_model(importlib.import_module("vllm_driver").describe_layers)  # by a name that workers can import
    result |= {
        "token_ids": _token_ids(outputs),
        "logprobs": [_numbers(output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": [_numbers(output.prompt_logprobs) for output in outputs],
        "layers": ranks[0],
        "triton_calls": triton.calls if triton else 0,
        "swiglu_calls": swiglu.calls,
        "norm_calls": norm.calls,
        "int8_calls": {name: counted.calls for name, counted in int8.items()},
    }
    if len(ranks) > 1:
        result["ranks"] = ranks
    llm.llm_engine.engine_core.shutdown()
    return result


def _sleep_and_wake(llm, level: int) -> None:
    """Level 1 keeps the weights in the host's memory; level 2 drops them, and they are read again."""
    llm.sleep(level=level)
    llm.wake_up(tags=["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def _token_ids(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def _numbers(positions) -> list[dict[int, float]]:
    """vLLM's logprobs as {token: logprob} for every position that has them."""
    return [{token: entry.logprob for token, entry in position.items()} for position in positions or [] if position]


def describe_layers(model: torch.nn.Module) -> dict[str, dict]:
    """For each linear, experts or vocabulary layer, the method, and dtype, shape and SHA-256 of every parameter."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return {
        name: {
            "method": type(layer.quant_method).__name__,
            **{key: describe(value) for key, value in layer.named_parameters(recurse=False)},
        }
        for name, layer in model.named_modules()
        if isinstance(layer, (LinearBase, RoutedExperts, VocabParallelEmbedding))
    }


def weight_addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def describe(tensor: torch.Tensor) -> list:
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
    return [str(tensor.dtype), list(tensor.shape), digest]


class _Counted:
    """Makes the CPU run `launch` for an operator of rowint8, and counts its calls."""

    def __init__(self, operator: str, launch) -> None:
        from rowint8.kernels import ops  # noqa: F401 (defines the operator)

        self.calls = 0
        self.library = torch.library.Library("rowint8", "IMPL")
        self.library.impl(operator, self._counted(launch), "CPU", allow_override=True)

    def _counted(self, launch):
        def run(*args):
            self.calls += 1
            return launch(*args)

        return run


def _use_triton() -> _Counted:
    """`rowint8::linear` through its Triton launcher (needs TRITON_INTERPRET=1)."""
    from rowint8.kernels.dispatch import run

    return _Counted("linear", partial(run, "linear"))


@contextmanager
def _patches(job: dict, memory: dict):
    """What `job` asks to change in vLLM while a model loads; `memory` takes what was measured."""
    wanted = {
        "tie_by_weight": _tying_by_weight,
        "save": _keeping_plain_weights,
        "load_memory": lambda: _measuring_load(memory, Path(job["model"])),
    }
    with ExitStack() as patches:
        # vLLM looks at a class of models in a process of its own, where its cache does not know it yet: ten seconds.
        patches.enter_context(patch("vllm.model_executor.models.registry._run_in_subprocess", lambda look: look()))
        for key, change in wanted.items():
            if job.get(key):
                patches.enter_context(change())
        yield


@contextmanager
def _measuring_load(memory: dict, folder: Path):
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load = BaseModelLoader.load_model

    def measured(*args, **kwargs):
        with _PeakMemory(ignore={file.stat().st_size for file in folder.glob("*.safetensors")}) as peak:
            model = load(*args, **kwargs)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
        memory.update(peak=peak.bytes, final=sum(storages.values()))
        return model

    with patch.object(BaseModelLoader, "load_model", measured):
        yield


class _PeakMemory:
    """Most bytes of tensors at any one time in the block, beyond those before it, on the GPU or else on the CPU.

    On the CPU a mapped file counts as one allocation of its size; those are to `ignore`.
    """

    def __init__(self, ignore: set[int]) -> None:
        self.ignore = ignore

    def __enter__(self) -> "_PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profiler = torch.profiler.profile(profile_memory=True).__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.profiler.__exit__(*exception)
        events = self.profiler.profiler.kineto_results.events()
        allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.bytes = max(accumulate(nbytes for _, nbytes in allocations if abs(nbytes) not in self.ignore))


@contextmanager
def _keeping_plain_weights():
    """Unquantized linear layers keep their weight, which vLLM's CPU build drops once it has packed it."""
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    with patch.object(utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: pack(layer, False)):
        yield


@contextmanager
def _tying_by_weight():
    """Models share the embedding's parameter with the head, where vLLM 0.32 would call `tie_weights`."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    def tie_weights(head, embed_tokens):
        head.weight = embed_tokens.weight
        return head

    with patch.object(ParallelLMHead, "tie_weights", tie_weights):
        yield


if __name__ == "__main__":
    main()
