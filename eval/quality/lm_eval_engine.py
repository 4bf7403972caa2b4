"""The small engine as a model class of lm-eval: it answers what lm-eval's own `hf` does, from the same tokens.

What a request means (where a text is cut, what stands before an empty context, when a text ends) is taken from `hf`, so
that the two differ by arithmetic alone.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from rowint8.baseline_engine.config import EngineConfig
from rowint8.baseline_engine.engine import Engine
from rowint8.baseline_engine.sampler import SamplingParams
from rowint8.baseline_engine.scoring import Text, score

Encoded = tuple[Any, list[int], list[int]]
"""(what lm-eval asked, the context's tokens, the continuation's)."""


@register_model("baseline")
class EngineLM(TemplateLM):
    """lm-eval's requests, batched by the engine's own scheduler."""

    def __init__(self, pretrained: str, max_length: int, max_gen_toks: int = 256, **settings: Any):
        """Loads the engine.

        Args:
            pretrained: a model folder.
            max_length: tokens that the model sees at a time; of a longer text the beginning is cut off.
            max_gen_toks: tokens to generate where a task does not say.
            settings: further fields of `EngineConfig`, such as dtype and quantization.

        Raises:
            EngineError: the engine cannot run the model, or not with so many tokens.
        """
        super().__init__()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False)
        self.max_length, self.max_gen_toks = max_length, max_gen_toks
        # One token more: the engine keeps a place for what it would generate.
        self._engine = Engine(EngineConfig(pretrained, **{"mode": "eager", "max_context": max_length + 1, **settings}))
        self._device = self._engine.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special ones are added as the tokenizer does by itself, unless the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            texts.append(Text(tokens, len(tokens) - len(continuation)))
        return [(sum(found.logprobs), all(found.greedy)) for found in score(self._engine, texts)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length` tokens that predict each token once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completes each context up to the first of its stop strings, which the text does not include."""
        prompts, params = zip(*(self._generation(*request.args) for request in requests), strict=True)
        texts = []
        for completion, sampling in zip(self._engine.generate(prompts, params), params, strict=True):
            if completion.error:
                raise RuntimeError(completion.error)
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, list(sampling.stop), think_end_token=None))
        return texts

    def _generation(self, context: str, options: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        """The tokens of a prompt that leaves room for its completion, and how to complete it."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        eos = self.tokenizer.decode(self.eot_token_id)
        stops = tuple(filter(None, handle_stop_sequences(given.pop("until"), eos=eos)))
        tokens, count = maybe_truncate(self.tok_encode(context), given.pop("max_gen_toks"), self.max_length)
        drawn = given if given.pop("do_sample") else {}
        params = SamplingParams(max_tokens=count, stop=stops, stop_token_ids=(self.eot_token_id,), **drawn)
        return tokens or [self.prefix_token_id], params
