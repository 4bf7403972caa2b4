"""The table of bytes that a model's weights take in each format, by arithmetic; nothing is measured here."""

from collections.abc import Mapping

from rowint8.eval.markdown import table
from rowint8.eval.models import FORMATS, MODELS, embedding_bytes, weight_bytes
from rowint8.eval.results.schema import GIB


def memory_section(ceilings: Mapping[str, float]) -> str:
    """A line a model and format, where a card was measured with the least time in which it can read the weights."""
    device, rate = max(ceilings.items(), key=lambda item: item[1], default=("", None))
    heading = ["model", "linear weights", "bytes of all weights", "GiB", "x bf16", *(["read once, ms"] if rate else [])]
    lines = []
    for model in ("llama-3.1-8b", "llama-3.1-70b"):
        whole = weight_bytes(MODELS[model], "bf16")
        for form, lm_head in [*((form, False) for form in FORMATS), ("rowint8", True)]:
            size = weight_bytes(MODELS[model], form, lm_head)
            name = f"{form} + lm_head" if lm_head else form
            least = [f"{(size - embedding_bytes(MODELS[model])) / rate / 1e9:.2f}"] if rate else []
            lines.append([model, name, f"{size:,}", f"{size / GIB:.2f}", f"{size / whole:.3f}", *least])
    note = "Read once: all but the embedding, the least time of a token"
    return table(heading, lines) + (f"\n{note}, at {rate:.2f} TB/s ({device}).\n" if rate else "")
