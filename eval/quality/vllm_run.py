"""An offline vLLM generation, for a process of its own."""

from typing import Any


def generate(llm: dict[str, Any], sampling: dict[str, Any], prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Runs vLLM once.

    Args:
        llm: arguments of `vllm.LLM`.
        sampling: arguments of `SamplingParams`.
        prompts: token ids of each.

    Returns:
        For each prompt {"token_ids": [...], "logprobs": [{token id: logprob}, ...]}; logprobs hold what `sampling` asks
        for at each generated position.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(**llm)
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [request.outputs[0] for request in engine.generate(inputs, SamplingParams(**sampling))]
    return [{"token_ids": list(output.token_ids), "logprobs": _plain(output.logprobs)} for output in outputs]


def _plain(logprobs: Any) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in position.items()} for position in logprobs or []]
