"""What a model folder's config.json says, checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from rowint8.baseline_engine.errors import EngineError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
    if name is not None and name not in DTYPES:
        raise EngineError(f"{folder / 'config.json'}: dtype {name}; accepted are {', '.join(DTYPES)}")
    return DTYPES[name or "float32"]


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
