"""What the user asks for, and what a model folder's config.json says; both checked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from rowint8.baseline_engine.errors import EngineError, SettingError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class EngineConfig:
    """What to load and how to run it."""

    model: str
    """A local folder, or a hub name."""
    quantization: Literal["none", "rowint8"] = "none"
    """rowint8: linear weights as INT8 rows. A checkpoint that holds INT8 already needs no flag."""
    fused: bool | None = None
    """One operator for gate, up, SiLU and product. None: with rowint8 wherever the MLP has no bias."""
    int8_lm_head: bool = False
    """With rowint8: the output layer too, and with it the embedding where the two are one tensor."""
    mode: Literal["eager", "compile", "graph"] = "eager"
    """compile: `torch.compile` of the decoder layer, shared by all layers. graph: compiled, and decode steps replayed
    as CUDA graphs; needs a GPU."""
    prompt_graph_tokens: int = 0
    """With mode graph: most tokens of a step with prompts that is replayed as a CUDA graph, where attention can be
    (FlashAttention 3). 0 leaves prompts to launches one by one; what graphs gain there is not measured yet."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations and unquantized weights; auto is the checkpoint's."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    max_seqs: int = 256
    """Most requests that run at the same time."""
    max_batch_tokens: int = 8192
    """Most tokens that one step computes; longer prompts are prefilled in pieces."""
    max_context: int | None = None
    """Most tokens of a prompt and its output. None: as many as the model and the cache take."""
    cache_tokens: int | None = None
    """Tokens that the KV cache holds. None: on CUDA what memory_fraction leaves, on the CPU 16384."""
    memory_fraction: float = 0.9
    """Of the GPU's memory, for weights, activations and KV cache together."""
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    prefix_caching: bool = True
    """Share the blocks of common beginnings between requests."""
    overlap: bool | None = None
    """Prepare and queue a step before the tokens of the one before have reached the host. None: on CUDA."""

    def __post_init__(self) -> None:
        _check_choice("quantization", self.quantization, ("none", "rowint8"))
        _check_choice("mode", self.mode, ("eager", "compile", "graph"))
        _check_choice("dtype", self.dtype, ("auto", *_DTYPES))
        for name in ("max_seqs", "max_batch_tokens", "block_size"):
            _check_positive(name, getattr(self, name))
        for name in ("max_context", "cache_tokens"):
            _check_positive(name, getattr(self, name) or 1)
        if self.prompt_graph_tokens < 0:
            raise SettingError(f"prompt_graph_tokens is {self.prompt_graph_tokens}; accepted is 0 or more")
        if not 0 < self.memory_fraction <= 1:
            raise SettingError(f"memory_fraction is {self.memory_fraction}; accepted is above 0 and up to 1")

    def torch_dtype(self, model: "ModelConfig") -> torch.dtype:
        return model.dtype if self.dtype == "auto" else _DTYPES[self.dtype]

    def torch_device(self) -> torch.device:
        """Raises SettingError where this machine has no such device, or the device cannot do what the mode asks."""
        device = self._device()
        if self.mode == "graph" and device.type != "cuda":
            raise SettingError("mode is 'graph', which needs a CUDA GPU; accepted here are eager and compile")
        return device

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise SettingError(f"device is {self.device!r}; accepted are auto, cpu, cuda and cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise SettingError(f"device is {self.device!r}; torch finds {torch.cuda.device_count()} CUDA GPUs here")
        return device


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions to a longer context; see `layers.rope_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and constants, in the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norms over each query and key head before the rotary positions (Qwen3)."""
    sliding_window: int | None
    """Tokens that a token looks back on, itself included; None: all."""
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    """The dtype that the checkpoint names (fp32 when it names none)."""
    int8_checkpoint: bool = False
    """The checkpoint's linear weights are INT8 already (`rowint8 quantize`)."""

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Reads config.json, and further end-of-sequence ids from generation_config.json where there is one.

        Raises:
            EngineError: a file is missing or broken, or the model is none that the engine can run.
        """
        raw = _read_json(folder / "config.json")
        _check_supported(raw, folder)
        try:
            hf = _ConfigFile.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise EngineError(f"{folder / 'config.json'}: {place}: {first['msg']}") from None
        generation = folder / "generation_config.json"
        extra_eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
        rope = hf.rope()
        kind = raw["architectures"][0].removesuffix("ForCausalLM")
        config = cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_dim=hf.head_dim or hf.hidden_size // hf.num_attention_heads,
            max_position_embeddings=hf.max_position_embeddings,
            rms_norm_eps=hf.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope, folder),
            qkv_bias=hf.attention_bias or kind == "Qwen2",
            o_bias=hf.attention_bias and kind != "Qwen2",
            mlp_bias=hf.mlp_bias,
            qk_norm=kind == "Qwen3",
            sliding_window=_sliding_window(raw, kind, folder),
            tie_word_embeddings=hf.tie_word_embeddings,
            eos_token_ids=tuple(sorted({*_as_ids(hf.eos_token_id), *_as_ids(extra_eos)})),
            dtype=_stored_dtype(hf.dtype, folder),
            int8_checkpoint=(raw.get("quantization_config") or {"serialized": False}).get("serialized", True),
        )
        config._check_heads(folder)
        return config

    def _check_heads(self, folder: Path) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise EngineError(
                f"{folder / 'config.json'}: {self.num_heads} query heads over {self.num_kv_heads} key heads of size "
                f"{self.head_dim}; query heads must be a multiple of key heads and the head size even"
            )


class _ConfigFile(BaseModel):
    """A config.json, with the defaults of transformers' LlamaConfig (whose import takes seconds)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """Since transformers 5, in place of the two above."""
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = 2
    dtype: str | None = Field(default=None, validation_alias=AliasChoices("dtype", "torch_dtype"))

    def rope(self) -> dict[str, Any]:
        """rope_theta, rope_type and what that type needs, whichever way the file gives them."""
        given = self.rope_parameters or self.rope_scaling or {}
        kind = given.get("rope_type", given.get("type", "default"))
        return {"rope_theta": self.rope_theta, **given, "rope_type": kind}


def _check_supported(raw: dict[str, Any], folder: Path) -> None:
    path = folder / "config.json"
    architectures = raw.get("architectures") or ["none named"]
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        given = ", ".join(map(str, architectures))
        raise EngineError(f"{path}: architecture {given}; the engine runs {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config"):
        _check_quantization(raw["quantization_config"], path)
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise EngineError(f"{path}: missing {', '.join(missing)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise EngineError(f"{path}: hidden_act {raw['hidden_act']!r}; the engine runs 'silu' only")


def _check_quantization(quantization: dict[str, Any], path: Path) -> None:
    """Raises EngineError unless it is what `rowint8 quantize` writes with every linear layer in INT8."""
    method = quantization.get("quant_method", "an unnamed method")
    if method != "rowint8":
        raise EngineError(
            f"{path}: the checkpoint is already quantized ({method}); give the fp32, bf16 or fp16 original"
        )
    options = {key: value for key, value in quantization.items() if key not in ("quant_method", "serialized") and value}
    if options:
        raise EngineError(
            f"{path}: quantization_config has {options}; the engine runs rowint8 checkpoints whose linear layers are "
            "all INT8, without further options; run this one in vLLM"
        )


def _rope_scaling(rope: dict[str, Any], folder: Path) -> RopeScaling | None:
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise EngineError(f"{folder / 'config.json'}: partial rotary positions are not supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise EngineError(f"{folder / 'config.json'}: rope scaling {kind!r}; accepted are 'default' and 'llama3'")
    missing = [key for key in _LLAMA3_KEYS if key not in rope]
    if missing:
        raise EngineError(f"{folder / 'config.json'}: llama3 rope scaling without {', '.join(missing)}")
    return RopeScaling(**{key: rope[key] for key in _LLAMA3_KEYS})


def _sliding_window(raw: dict[str, Any], kind: str, folder: Path) -> int | None:
    """The window of all layers. Qwen's is off unless use_sliding_window is true; Mistral's is 4096 unless given."""
    if kind == "Mistral":
        return raw.get("sliding_window", 4096)
    if not kind.startswith("Qwen") or not raw.get("use_sliding_window", False):
        return None
    full_below = raw.get("max_window_layers", 28)
    default = ["full_attention" if i < full_below else "sliding_attention" for i in range(raw["num_hidden_layers"])]
    types = set(raw.get("layer_types") or default)
    if len(types) > 1:
        raise EngineError(f"{folder / 'config.json'}: layers with and without sliding window; the engine runs one kind")
    return raw.get("sliding_window", 4096) if types == {"sliding_attention"} else None


def _stored_dtype(name: str | None, folder: Path) -> torch.dtype:
    if name is not None and name not in _DTYPES:
        raise EngineError(f"{folder / 'config.json'}: dtype {name}; accepted are {', '.join(_DTYPES)}")
    return _DTYPES[name or "float32"]


def _as_ids(eos: int | list[int] | None) -> list[int]:
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else eos


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EngineError(f"{path} is missing; --model needs a folder with config.json and safetensors") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_positive(name: str, given: int) -> None:
    if given < 1:
        raise SettingError(f"{name} is {given}; accepted is 1 or more")


def _check_choice(name: str, given: str, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise SettingError(f"{name} is {given!r}; accepted are {', '.join(accepted)}")
