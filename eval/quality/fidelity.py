"""How far quantization moves a model: the next-token distributions of the same text, against the original's.

All arithmetic is fp32 on the CPU, so that nothing differs but how weights and activations are rounded. One model is in
memory; a setup's weights are put into it. Of the original, its last hidden states are kept (fp32, hidden_size numbers a
token), from which its logits are computed again a few tokens at a time: no array of tokens x vocabulary ever exists.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rowint8.eval.errors import EvalError
from rowint8.eval.quality.fidelity_setups import Round, Weights, WeightSet
from rowint8.eval.results.schema import FidelityRow

CHUNK = 128
"""Tokens whose logits are in memory at a time."""
MOST_NATS = 30.0
"""The largest mean negative log-likelihood of a language model: a uniform guess among a million tokens has 14."""


@dataclass(frozen=True)
class TokenScores:
    """What one setup did at each predicted token, fp64 or bool [tokens]."""

    kl: Tensor
    """KL divergence of the setup from the original, nats: sum over tokens of p (log p - log q)."""
    nll: Tensor
    """Negative log-likelihood of the text's token, nats."""
    reference_nll: Tensor
    same_top1: Tensor
    """Whether both find the same token likeliest."""


class Fidelity:
    """One model in fp32, the text, and what the original weights make of it."""

    def __init__(self, folder: Path, reference: Weights, windows: Tensor, trust_remote_code: bool = False):
        """Loads the model and runs the original weights once.

        Raises:
            EvalError: the logits of this architecture are not a plain product with the output layer, or not finite; or
                the text has fewer than two tokens to predict.
        """
        if windows.numel() < len(windows) + 2:
            raise EvalError("one predicted token has no spread; give a larger --window or more --windows")
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
        self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self.windows = windows
        self._given = self._apply("the model", reference)
        self._check_head()
        self.reference_head = self._head().clone()
        self.reference_hidden = [self._hidden(window) for window in range(len(windows))]

    @torch.inference_mode()
    def score(self, setup: WeightSet) -> TokenScores:
        """Runs the text through the setup's weights and compares token by token.

        Raises:
            EvalError: the weights are of another model, or not all of its weights, or make no finite logits.
        """
        given = self._apply(setup.name, setup.weights)
        if different := given ^ self._given:
            has = "has" if different & given else "lacks"
            raise EvalError(f"{setup.name} {has} {min(different)}, unlike the model; it is of another one")
        with self._rounded_inputs(setup) as for_head:
            parts = [part for window in range(len(self.windows)) for part in self._compared(window, for_head)]
        scores = TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if not (scores.nll.mean() < MOST_NATS and scores.kl.isfinite().all()):
            raise EvalError(f"{setup.name}: the logits on this text are NaN, infinite, or no language model's")
        return scores

    def _compared(self, window: int, for_head: Round) -> Iterator[tuple[Tensor, ...]]:
        """`_compare` of a window, a few tokens at a time."""
        tokens, reference, hidden = self.windows[window], self.reference_hidden[window], self._hidden(window)
        for start in range(0, len(tokens) - 1, CHUNK):
            rows = slice(start, min(start + CHUNK, len(tokens) - 1))
            logp = linear(reference[rows], self.reference_head).log_softmax(-1)
            logq = linear(for_head(hidden[rows]), self._head()).log_softmax(-1)
            yield _compare(logp, logq, tokens[1:][rows])

    @contextmanager
    def _rounded_inputs(self, setup: WeightSet) -> Iterator[Round]:
        """Rounds the inputs of the setup's layers as long as the block runs; gives what rounds those of the head."""
        rounding, for_head = setup.activations or _as_it_is, _as_it_is
        modules, hooks = dict(self.model.named_modules()), []
        for name in setup.layers:
            module = modules.get(name)
            if module is not None and module.weight is self._head():
                for_head = rounding
            elif module is not None:
                hooks.append(module.register_forward_pre_hook(lambda _, given: (rounding(given[0]), *given[1:])))
        try:
            yield for_head
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _apply(self, setup: str, weights: Weights) -> set[str]:
        """Puts the weights into the model; their names, a tied one's first."""
        first_name = {id(parameter): name for name, parameter in self.model.named_parameters()}
        parameters, given = dict(self.model.named_parameters(remove_duplicate=False)), set()
        for name, tensor in weights():
            if name in parameters:
                wanted = parameters[name]
                if tensor.shape != wanted.shape or not tensor.is_floating_point():
                    what = f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                    raise EvalError(f"{setup}: {what}; the model's is a float {list(wanted.shape)}")
                wanted.copy_(tensor)
                name = first_name[id(wanted)]
            given.add(name)
        return given

    @torch.inference_mode()
    def _hidden(self, window: int) -> Tensor:
        """What the output layer sees of a window, [window, hidden_size]."""
        return self.model.base_model(self.windows[window][None], use_cache=False).last_hidden_state[0]

    def _head(self) -> Tensor:
        return self.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]

    @torch.inference_mode()
    def _check_head(self) -> None:
        tokens = self.windows[:1, :8]
        product = linear(self.model.base_model(tokens).last_hidden_state, self._head())
        if not product.isfinite().all():
            raise EvalError("the model's logits are NaN or infinite; its weights are at fault")
        if not torch.allclose(product, self.model(tokens).logits, rtol=1e-4, atol=1e-4):
            raise EvalError("this architecture changes its logits after the output layer, which is not supported here")


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _compare(logp: Tensor, logq: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of TokenScores from log-probabilities [tokens, vocabulary] of the original (p) and the setup (q)."""
    kl = (logp.exp() * (logp - logq)).sum(-1).double()
    nll, reference_nll = (-part.gather(1, targets[:, None])[:, 0].double() for part in (logq, logp))
    return kl, nll, reference_nll, logp.argmax(-1) == logq.argmax(-1)


def measure(
    model: Fidelity, setups: Sequence[WeightSet], text: str, advance: Callable[[], None] = lambda: None
) -> Iterator[FidelityRow]:
    """The row of the unquantized model, then one for each setup; `advance` is called after each."""
    for index, setup in enumerate(setups):
        scores = model.score(setup)
        if index == 0:
            yield reference_row(scores, text, model.windows.shape[1])
        yield fidelity_row(setup.name, scores, text, model.windows.shape[1])
        advance()


def reference_row(scores: TokenScores, text: str, window: int) -> FidelityRow:
    """The original's own perplexity; its distance from itself is 0."""
    zeros = torch.zeros_like(scores.kl)
    same = torch.ones_like(scores.same_top1)
    itself = TokenScores(zeros, scores.reference_nll, scores.reference_nll, same)
    return fidelity_row("unquantized", itself, text, window)


def fidelity_row(setup: str, scores: TokenScores, text: str, window: int) -> FidelityRow:
    """Sums up one setup. Standard errors take tokens as independent."""
    difference = scores.nll - scores.reference_nll
    return FidelityRow(
        setup=setup,
        text=text,
        window=window,
        dtype="float32",
        tokens=len(difference),
        perplexity=math.exp(scores.nll.mean()),
        nll_difference=float(difference.mean()),
        nll_difference_stderr=float(difference.std() / len(difference) ** 0.5),
        kl_mean=max(0.0, float(scores.kl.mean())),
        kl_median=max(0.0, float(scores.kl.median())),
        kl_p99=max(0.0, float(scores.kl.quantile(0.99))),
        kl_max=max(0.0, float(scores.kl.max())),
        same_top1=float(scores.same_top1.double().mean()),
    )
