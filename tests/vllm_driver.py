"""Runs vLLM engines in a process of its own, for test_vllm_*.py: a job per line of stdin, a result per line of stdout.

A job is {"model": folder, "llm": arguments of `LLM`, "prompts": token ids, "sampling": arguments of `SamplingParams`,
"triton": whether the CPU runs the Triton kernel, "reload": whether to load the weights a second time, "lora": folder of
an adapter for all prompts, "tie_by_weight": whether models tie their head as many did before vLLM 0.32}.

A result is {"token_ids", "logprobs", "prompt_logprobs", "layers" (see `describe_layers`), "triton_calls",
"swiglu_calls"} and, with tensor parallelism, "ranks" (the layers of every rank), after a reload "same_memory" (whether
every weight stayed where it was); or {"error": messages of the exception and its causes}. What vLLM prints goes to
stderr.
"""

import gc
import hashlib
import importlib
import json
import os
import sys
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_run_guarded(json.loads(line))), file=results, flush=True)


def _run_guarded(job: dict) -> dict:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
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

    from rowint8.kernels import cpu

    triton = _use_triton() if job.get("triton") else None
    swiglu = _Counted("swiglu", cpu.swiglu)
    with _tying_by_weight() if job.get("tie_by_weight") else nullcontext():
        llm = LLM(job["model"], **job["llm"])
    result = {}
    if job.get("reload"):
        before = llm.apply_model(weight_addresses)
        llm.collective_rpc("reload_weights")
        result["same_memory"] = llm.apply_model(weight_addresses) == before
    sampling = SamplingParams(**job.get("sampling", {}))
    lora = LoRARequest("adapter", 1, job["lora"]) if job.get("lora") else None
    prompts = [{"prompt_token_ids": ids} for ids in job.get("prompts", [])]
    outputs = llm.generate(prompts, sampling, lora_request=lora)
    ranks = llm.apply_model(importlib.import_module("vllm_driver").describe_layers)  # by a name that workers can import
    result |= {
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [_numbers(output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": [_numbers(output.prompt_logprobs) for output in outputs],
        "layers": ranks[0],
        "triton_calls": triton.calls if triton else 0,
        "swiglu_calls": swiglu.calls,
    }
    if len(ranks) > 1:
        result["ranks"] = ranks
    llm.llm_engine.engine_core.shutdown()
    return result


def _numbers(positions) -> list[dict[int, float]]:
    """vLLM's logprobs as {token: logprob} for every position that has them."""
    return [{token: entry.logprob for token, entry in position.items()} for position in positions or [] if position]


def describe_layers(model: torch.nn.Module) -> dict[str, dict]:
    """For each linear or vocabulary layer, the method, and dtype, shape and SHA-256 of every parameter."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return {
        name: {
            "method": type(layer.quant_method).__name__,
            **{key: _describe(value) for key, value in layer.named_parameters(recurse=False)},
        }
        for name, layer in model.named_modules()
        if isinstance(layer, (LinearBase, VocabParallelEmbedding))
    }


def weight_addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def _describe(tensor: torch.Tensor) -> list:
    digest = hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
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
    from rowint8.kernels.int8_linear import int8_linear

    return _Counted("linear", int8_linear)


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
