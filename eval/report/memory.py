"""The table of bytes that a model's weights take in each format, by arithmetic; nothing is measured here."""

from collections.abc import Mapping

from rowint8.eval.markdown import TBD, number, table
from rowint8.eval.models import FORMATS, MODELS, embedding_bytes, weight_bytes
from rowint8.eval.results.schema import GIB


def memory_section(ceilings: Mapping[str, float]) -> str:
    """A line a model and format, with the least time in which a card can read the weights once."""
    device, rate = max(ceilings.items(), key=lambda item: item[1], default=("the card", None))
    lines = []
    for model in ("llama-3.1-8b", "llama-3.1-70b"):
        whole = weight_bytes(MODELS[model], "bf16")
        for form, lm_head in [*((form, False) for form in FORMATS), ("rowint8", True)]:
            size = weight_bytes(MODELS[model], form, lm_head)
            read = size - embedding_bytes(MODELS[model])
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
