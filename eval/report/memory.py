"""Bytes of a Llama's weights in each format, by arithmetic on its config.json; nothing is measured here."""

from collections.abc import Callable, Mapping
from typing import Any

from rowint8.eval.markdown import TBD, number, table
from rowint8.eval.results.schema import GIB

FORMATS: dict[str, Callable[[int, int], int]] = {
    "bf16": lambda n, k: 2 * n * k,
    "rowint8": lambda n, k: n * k + 2 * n,
    "int8-group32": lambda n, k: n * k + 2 * n * -(-k // 32),
    "fp8-row": lambda n, k: n * k + 4 * n,
}
"""Format to the bytes of an [N, K] linear weight and its scales."""


def weight_bytes(config: Mapping[str, Any], form: str, lm_head: bool = False) -> int:
    """Bytes of all weights: linear layers in the format, embedding, norms and (unless `lm_head`) the head in bf16.

    Args:
        config: of a Llama without biases (config.json).
        lm_head: the head, where it is not tied to the embedding, in the format too.
    """
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    size = FORMATS[form]
    head = 0 if config["tie_word_embeddings"] else (size if lm_head else FORMATS["bf16"])(vocab, hidden)
    linear = layers * sum(size(n, k) for n, k in _layer(config))
    return linear + head + embedding_bytes(config) + 2 * hidden * (2 * layers + 1)


def _layer(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return [(q + 2 * kv, hidden), (hidden, q), (2 * intermediate, hidden), (hidden, intermediate)]


def embedding_bytes(config: Mapping[str, Any]) -> int:
    """Of the table in bf16, of which a step reads only its tokens' rows."""
    return 2 * config["vocab_size"] * config["hidden_size"]


def memory_section(ceilings: Mapping[str, float]) -> str:
    """A line a model and format, with the least time in which a card can read the weights once."""
    from rowint8.eval.engines.setups import SHAPES

    device, rate = max(ceilings.items(), key=lambda item: item[1], default=("the card", None))
    lines = []
    for model in ("llama-3.1-8b", "llama-3.1-70b"):
        whole = weight_bytes(SHAPES[model], "bf16")
        for form, lm_head in [*((form, False) for form in FORMATS), ("rowint8", True)]:
            size = weight_bytes(SHAPES[model], form, lm_head)
            read = size - embedding_bytes(SHAPES[model])
            least = number(read / rate / 1e9, 2) if rate else TBD
            name = f"{form} + lm_head" if lm_head else form
            lines.append([model, name, f"{size:,}", number(size / GIB, 2), number(size / whole, 3), least])
    note = (
        f"\nRead once, all but the embedding, at {rate:.2f} TB/s ({device}): the least time of a token.\n"
        if rate
        else ""
    )
    heading = ["model", "linear weights", "bytes of all weights", "GiB", "x bf16", "read once, ms"]
    return table(heading, lines) + note
