"""What the user asks for: of the engine (`EngineConfig`), and for each request (`SamplingParams`).

A field's type says which values are accepted, and pydantic checks them when the object is made. The docstrings are also
the help of `baseline-generate`, which has an option for each field. Neither torch nor pydantic is imported until it is
needed, so that `--help` answers at once.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, MinLen

from rowint8.baseline_engine.errors import SettingError, describe

if TYPE_CHECKING:
    import torch

    from rowint8.baseline_engine.model_config import ModelConfig

MIN_TEMPERATURE = 1e-5
"""Below it, differences between logits overflow; 0 is what is meant."""
MAX_LOGPROBS = 20
PROMPT_SIZES = (32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
"""Numbers of tokens for which steps with prompts are captured, as far as `prompt_graph_tokens` allows."""


class _Checked:
    """Checks the fields of a frozen dataclass against their types; lists become tuples."""

    def __post_init__(self) -> None:
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        for name, value in _validated(type(self), given).items():
            object.__setattr__(self, name, value)


def _validated(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        return vars(_schema(kind).model_validate(given))
    except ValidationError as error:
        raise SettingError(describe(error)) from None
    except OverflowError:  # an integer where a float is due
        raise SettingError("a number is too large; give one that fits a double") from None


@cache
def _schema(kind: type) -> Any:
    from pydantic import ConfigDict, create_model

    options = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return create_model(kind.__name__, __config__=options, **fields)


@dataclass(frozen=True)
class EngineConfig(_Checked):
    """What to load and how to run it."""

    model: Annotated[str, MinLen(1)]
    """Folder with config.json, safetensors and tokenizer, or a hub name."""
    quantization: Literal["none", "rowint8"] = "none"
    """rowint8: linear weights as INT8 rows, quantized while loading. A checkpoint that holds INT8 needs no flag."""
    fused: bool | None = None
    """Gate, up, SiLU and product as one operator; needs rowint8. Default: with rowint8, unless the MLP has a bias."""
    int8_lm_head: bool = False
    """With rowint8: the output layer too, and with it the embedding where the two are one tensor."""
    activations: Literal["int8"] | None = None
    """int8, with rowint8: tokens are rounded to INT8 before every INT8 layer. Faster with many tokens, and a token's
    products do not depend on its batch. Default: as the checkpoint says."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """eager: operator by operator. compile: torch.compile of the decoder layer. graph: compiled, and steps replayed as
    CUDA graphs; needs a GPU. auto: graph on a GPU, eager on the CPU."""
    prompt_graph_tokens: Literal[0] | Annotated[int, Interval(ge=PROMPT_SIZES[0], le=PROMPT_SIZES[-1])] = 1024
    """With mode graph: most tokens of a step with prompts that is replayed as a CUDA graph, where attention can be
    (FlashAttention 3). 0 launches the kernels of such steps one by one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activations and unquantized weights have it; auto is the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one. CUDA_VISIBLE_DEVICES chooses among several."""
    max_seqs: Annotated[int, Interval(ge=1, le=2**16)] = 256
    """Most requests that run at the same time."""
    max_batch_tokens: Annotated[int, Interval(ge=1, le=2**20)] = 8192
    """Most tokens that one step computes; longer prompts are prefilled in pieces."""
    max_context: Annotated[int, Ge(2)] | None = None
    """Most tokens of a prompt and its output. Default: as many as the model and the cache take."""
    cache_tokens: Annotated[int, Ge(2)] | None = None
    """Tokens that the KV cache holds. Default: on a GPU what memory_fraction leaves, on the CPU 16384."""
    memory_fraction: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the GPU's memory for weights, activations and KV cache together."""
    block_size: Annotated[int, Interval(ge=1, le=2**16)] = 16
    """Tokens in a block of the KV cache."""
    prefix_caching: bool = True
    """Share the blocks of common beginnings between requests."""
    overlap: bool | None = None
    """Prepare and queue a step before the tokens of the one before have reached the host. Default: on a GPU."""

    def torch_dtype(self, model: "ModelConfig") -> "torch.dtype":
        from rowint8.baseline_engine.model_config import DTYPES

        return model.dtype if self.dtype == "auto" else DTYPES[self.dtype]

    def torch_device(self) -> "torch.device":
        """Raises SettingError where this machine has no such device, or the device cannot do what the mode asks."""
        import torch

        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            raise SettingError("device is 'cuda'; torch finds no CUDA GPU here")
        device = torch.device("cpu" if self.device == "cpu" or not found else "cuda")
        if self.mode == "graph" and device.type != "cuda":
            raise SettingError("mode is 'graph', which needs a CUDA GPU; accepted here are eager and compile")
        return device

    def mode_on(self, device: "torch.device") -> Literal["eager", "compile", "graph"]:
        """The mode, with auto resolved: the fastest on this kind of device."""
        if self.mode != "auto":
            return self.mode
        return "graph" if device.type == "cuda" else "eager"


@dataclass(frozen=True)
class SamplingParams(_Checked):
    """How one request's tokens are chosen, and when it ends."""

    max_tokens: Annotated[int, Ge(1)] = 64
    """Most tokens to generate, the end-of-sequence token included; fewer where prompt and output fill the context."""
    temperature: Literal[0] | Annotated[float, Interval(ge=MIN_TEMPERATURE, le=1_000_000)] = 0.0
    """0 is greedy (the most likely token); larger is more random."""
    top_k: Annotated[int, Interval(ge=0, le=2**31 - 1)] = 0
    """Draw from the k most likely tokens only; 0 is off."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw from the fewest tokens whose probabilities add up to at least p; 1 is off (arXiv:1904.09751)."""
    min_p: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Draw from tokens at least this times as likely as the likeliest; 0 is off (arXiv:2407.01082)."""
    repetition_penalty: Annotated[float, Interval(ge=0.01, le=100)] = 1.0
    """Logits of tokens seen so far, prompt included, are divided by it if positive, else multiplied; 1 is off
    (arXiv:1909.05858)."""
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] | None = None
    """The same seed, prompt and parameters draw the same tokens. Default: a new seed for each request."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever the model says; for measurements."""
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Text that ends the output, which does not include it. Needs a tokenizer."""
    stop_token_ids: tuple[Annotated[int, Ge(0)], ...] = ()
    """Token that ends the output besides the model's end-of-sequence tokens."""
    logprobs: Annotated[int, Interval(ge=0, le=MAX_LOGPROBS)] | None = None
    """How many of the likeliest tokens to report at each position, besides the chosen one. Default: no report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise SettingError("top_k, top_p and min_p have no effect at temperature 0; set a temperature above 0")
