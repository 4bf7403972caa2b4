"""Tiny random models in the layout of the hub, for tests that need a whole model and no sense."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

VOCABULARY = 128


def write_tiny(
    folder: Path,
    config_class: type[PretrainedConfig] = LlamaConfig,
    *,
    max_shard_size: str = "100KB",
    dtype: torch.dtype = torch.float32,
    **overrides,
) -> Path:
    """Saves a random model in shards; keywords override its config. Biases and norms are random too."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    model = AutoModelForCausalLM.from_config(config_class(**(settings | overrides)), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def prompts_of_ids(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
