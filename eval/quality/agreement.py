"""Do two engines say the same? Greedy tokens of the small engine and of vLLM, both with rowint8, side by side; or of
vLLM on several ranks and on one.

The weights are the same bits and the products the same operator, but attention, norms and rotary positions are computed
by different code, so logits differ by rounding. Where the two best tokens are closer than that, the engines may part,
and from there on they write different texts. The gap between the two at the parting says whether that was a tie.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rowint8.eval.processes import require_package, run_worker, vllm_environment
from rowint8.eval.quality import vllm_run
from rowint8.eval.results.schema import AgreementRow

TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at a temperature of",
    "The three primary colours are",
    "To make a cup of tea, first",
    "The quick brown fox",
    "In 1969, the first humans",
    "A binary search works by",
    "The best way to learn a new language is",
    "Dear Sir or Madam, I am writing to",
)
_CANDIDATES = 20
"""Logprobs asked of vLLM at every position."""


def compare(model: Path, dtype: str, ranks: int = 1) -> list[AgreementRow]:
    """Generates TOKENS tokens after each of PROMPTS with both engines; one row a prompt.

    Args:
        dtype: of the arithmetic in both: "bfloat16", "float16" or "float32".
        ranks: of vLLM. With several it is compared with vLLM on one, not with the small engine.

    Raises:
        EvalError: vLLM is not installed or failed.
    """
    from rowint8.baseline_engine.tokenizer import Tokenizer

    require_package("vllm", "run `pip install 'rowint8[vllm]'`")
    tokenizer = Tokenizer(model)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    if ranks == 1:
        ours = run_baseline(model, dtype, prompts)
    else:
        ours = [alone["token_ids"] for alone in run_vllm(model, dtype, prompts, 1)]
    theirs = run_vllm(model, dtype, prompts, ranks)
    return [row_of(*parts, dtype, ranks) for parts in zip(PROMPTS, ours, theirs, strict=True)]


def run_baseline(model: Path, dtype: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids of what the small engine writes after each prompt."""
    from rowint8.baseline_engine.engine import Engine, EngineConfig
    from rowint8.baseline_engine.sampler import SamplingParams

    settings: dict[str, Any] = {"quantization": "rowint8", "dtype": dtype, "mode": "eager"}
    engine = Engine(EngineConfig(str(model), **settings))
    completions = engine.generate(prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    return [completion.token_ids for completion in completions]


def run_vllm(model: Path, dtype: str, prompts: Sequence[Sequence[int]], ranks: int) -> list[dict[str, Any]]:
    """What `vllm_run.generate` returns for the prompts, from a process of its own."""
    request = {
        "llm": {
            "model": str(model.resolve()),
            "quantization": "rowint8",
            "dtype": dtype,
            "max_model_len": 256,
            "enforce_eager": True,
            "tensor_parallel_size": ranks,
        },
        "sampling": {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": _CANDIDATES},
        "prompts": prompts,
    }
    return run_worker(vllm_run.generate, request, vllm_environment(ranks))


def row_of(prompt: str, ours: list[int], theirs: dict[str, Any], dtype: str, ranks: int = 1) -> AgreementRow:
    """How many first tokens agree, and how far apart vLLM saw the two candidates where they part."""
    pairs = list(zip(ours, theirs["token_ids"], strict=True))
    agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    gap = None
    if agreed < len(pairs):
        mine, vllms = pairs[agreed]
        logprobs = {int(token): value for token, value in theirs["logprobs"][agreed].items()}
        gap = logprobs[vllms] - logprobs.get(mine, min(logprobs.values()))
    counts: dict[str, Any] = {"tokens": len(pairs), "agreed": agreed, "tensor_parallel_size": ranks}
    return AgreementRow(setup="rowint8", dtype=dtype, prompt=prompt, logprob_gap=gap, **counts)
