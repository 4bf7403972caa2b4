"""The models that are measured, as their config.json describes them, and the arithmetic on their sizes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rowint8.baseline_engine.errors import one_line
from rowint8.eval.errors import EvalError

Config = Mapping[str, Any]
"""A config.json of the Llama kind."""

_LLAMA_3_1: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_QWEN_2_5: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_QWEN_3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _shaped(
    family: Config, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**family, **shape, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}


MODELS = {
    "llama-3.1-8b": _shaped(_LLAMA_3_1, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _shaped(_LLAMA_3_1, 8192, 28672, 80, 64, 8),
    "qwen2.5-0.5b": _shaped(_QWEN_2_5, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _shaped(_QWEN_2_5, 1536, 8960, 28, 12, 2, max_position_embeddings=131072),
    "qwen2.5-7b": _shaped(_QWEN_2_5, 3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "qwen3-30b-a3b": _shaped(_QWEN_3_MOE, 2048, 6144, 48, 32, 4, moe_intermediate_size=768),
    "qwen3-235b-a22b": _shaped(_QWEN_3_MOE, 4096, 12288, 94, 64, 4, moe_intermediate_size=1536),
    "mixtral-8x7b": _shaped(_MIXTRAL, 4096, 14336, 32, 32, 8),
    "tiny": _shaped(_LLAMA_3_1, 128, 256, 2, 2, 2, vocab_size=512, bos_token_id=1, eos_token_id=2),
}
"""config.json of each model; "tiny" is for trying a command."""
DEFAULT_MODEL = "llama-3.1-8b"

FORMATS: dict[str, Callable[[int, int], int]] = {
    "bf16": lambda n, k: 2 * n * k,
    "rowint8": lambda n, k: n * k + 2 * n,
    "int8-group32": lambda n, k: n * k + 2 * n * -(-k // 32),
    "fp8-row": lambda n, k: n * k + 4 * n,
}
"""Format to the bytes of an [N, K] linear weight and its scales."""


def layer_weights(config: Config, ranks: int = 1) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear weight in a decoder layer; q, k, v are stacked, as are gate and up.

    Args:
        ranks: GPUs that share the model by tensor parallelism; the sizes are those on one of them.
    """
    hidden, intermediate = config["hidden_size"], config["intermediate_size"] // ranks
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = (config[f"num_{kind}_heads"] // ranks * head_dim for kind in ("attention", "key_value"))
    return {
        "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }


def weight_bytes(config: Config, form: str, lm_head: bool = False) -> int:
    """Bytes of all weights: linear layers in the format, embedding, norms and (unless `lm_head`) the head in bf16.

    Args:
        config: a model without biases.
        lm_head: store the head, where it is not tied to the embedding, in the format too.
    """
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    size = FORMATS[form]
    head = 0 if config["tie_word_embeddings"] else (size if lm_head else FORMATS["bf16"])(vocab, hidden)
    linear = layers * sum(size(n, k) for n, k in layer_weights(config).values())
    return linear + head + embedding_bytes(config) + 2 * hidden * (2 * layers + 1)


def embedding_bytes(config: Config) -> int:
    """Bytes of the embedding table in bf16, of which a step reads only its tokens' rows."""
    return 2 * config["vocab_size"] * config["hidden_size"]


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises EvalError where a config is of weights that are quantized already, which would be called original ones."""
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        method = one_line(method or "an unnamed method")
        raise EvalError(f"{folder} is already quantized ({method}); give the fp32, bf16 or fp16 original")
