"""A decoder's shape and constants, from a model folder's config.json."""

from dataclasses import dataclass
from pathlib import Path

import torch

from rowint8.baseline_engine.config_file import (
    ConfigFile,
    ExpertsConfig,
    NotRunnable,
    RopeScaling,
    StoredInt8,
    read_config,
    read_more_eos_ids,
)
from rowint8.baseline_engine.errors import EngineError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    experts: ExpertsConfig | None = None
    """In place of the MLP, which `intermediate_size` and `mlp_bias` describe."""
    stored_int8: StoredInt8 | None = None
    """The checkpoint's linear weights, where they are INT8 already (`rowint8 quantize`)."""

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Reads config.json, and further end-of-sequence ids from generation_config.json where there is one.

        Raises:
            EngineError: a file is missing or broken, or the model is none that the engine can run.
        """
        try:
            return cls._from_file(read_config(folder), read_more_eos_ids(folder))
        except NotRunnable as error:
            raise EngineError(f"{folder / 'config.json'}: {error}") from None

    @classmethod
    def _from_file(cls, file: ConfigFile, more_eos_ids: list[int]) -> "ModelConfig":
        (num_heads, num_kv_heads, head_dim), (qkv_bias, o_bias) = file.heads(), file.qkv_and_o_bias()
        rope_theta, rope_scaling = file.rope()
        return cls(
            vocab_size=file.vocab_size,
            hidden_size=file.hidden_size,
            intermediate_size=file.intermediate_size,
            num_layers=file.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=file.max_position_embeddings,
            rms_norm_eps=file.rms_norm_eps,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=file.mlp_bias,
            qk_norm=file.has_qk_norm,
            sliding_window=file.window(),
            tie_word_embeddings=file.tie_word_embeddings,
            eos_token_ids=tuple(sorted({*file.eos_ids(), *more_eos_ids})),
            dtype=DTYPES[file.dtype or "float32"],
            experts=file.experts(),
            stored_int8=file.stored_int8(),
        )
