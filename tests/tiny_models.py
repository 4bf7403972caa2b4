"""Tiny random models in the layout of the hub, for tests that need a whole model and no sense."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
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


def write_tokenizer(folder: Path, kind: str) -> int:
    """Adds a tokenizer without merges to a folder, and gives the size of its vocabulary (at most 288).

    "bytes" decodes each token to a byte (GPT-2's way); "fallback" has words, and a token <0xNN> for each byte (Llama
    2's way, which takes one space from the beginning).
    """
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [
        "▁",
        "▁▁",
        "▁the",
        "▁a",
        "the",
        "a",
        "b",
        "▁Hello",
        "▁world",
        "world",
        ".",
        "!",
        "»",
        "é",
        "世",
        "界",
        "\n",
    ]
    words = letters if kind == "bytes" else [*(f"<0x{byte:02X}>" for byte in range(256)), *others]
    vocabulary = {word: token for token, word in enumerate(dict.fromkeys(special + words))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=kind == "fallback", fuse_unk=True)
    )
    if kind == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)
