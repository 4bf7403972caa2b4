"""Runs vLLM engines in a process of its own, for test_vllm_*.py: a job per line of stdin, a result per line of stdout.

A job is {"model": folder, "llm": arguments of `LLM`, "prompts": token ids, "sampling": arguments of `SamplingParams`,
"triton": whether the CPU runs the Triton kernel, "reload": whether to load the weights a second time}.

A result is {"token_ids", "logprobs", "prompt_logprobs", "layers" (see `describe_layers`), "triton_calls"} and, with
tensor parallelism, "ranks" (the layers of every rank); or {"error": messages of the exception and its causes}. What
vLLM prints goes to stderr.
"""

import gc
import hashlib
import importlib
import json
import os
import sys

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

    library = _use_triton() if job.get("triton") else None
    llm = LLM(job["model"], **job["llm"])
    if job.get("reload"):
        llm.collective_rpc("reload_weights")
    sampling = SamplingParams(**job.get("sampling", {}))
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job.get("prompts", [])], sampling)
    ranks = llm.apply_model(importlib.import_module("vllm_driver").describe_layers)  # by a name that workers can import
    result = {
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [_numbers(output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": [_numbers(output.prompt_logprobs) for output in outputs],
        "layers": ranks[0],
        "triton_calls": library.calls if library else 0,
    }
    if len(ranks) > 1:
        result["ranks"] = ranks
    llm.llm_engine.engine_core.shutdown()
    return result


def _numbers(positions) -> list[dict[int, float]]:
    """vLLM's logprobs as {token: logprob} for every position that has them."""
    return [{token: entry.logprob for token, entry in position.items()} for position in positions or [] if position]


def describe_layers(model: torch.nn.Module) -> dict[str, dict]:
    """For each vLLM linear layer, the method, and dtype, shape and SHA-256 of every parameter."""
    from vllm.model_executor.layers.linear import LinearBase

    return {
        name: {
            "method": type(layer.quant_method).__name__,
            **{key: _describe(value) for key, value in layer.named_parameters(recurse=False)},
        }
        for name, layer in model.named_modules()
        if isinstance(layer, LinearBase)
    }


def _describe(tensor: torch.Tensor) -> list:
    digest = hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
    return [str(tensor.dtype), list(tensor.shape), digest]


class _use_triton:
    """Makes the CPU run the Triton launcher for `rowint8::linear` (needs TRITON_INTERPRET=1) and counts its calls."""

    def __init__(self) -> None:
        from rowint8.kernels import ops  # noqa: F401 (defines the operator)
        from rowint8.kernels.int8_linear import int8_linear

        self.calls = 0
        self.library = torch.library.Library("rowint8", "IMPL")
        self.library.impl("linear", self._counted(int8_linear), "CPU", allow_override=True)

    def _counted(self, launch):
        def linear(x, values, scale, bias=None):
            self.calls += 1
            return launch(x, values, scale, bias)

        return linear


if __name__ == "__main__":
    main()
