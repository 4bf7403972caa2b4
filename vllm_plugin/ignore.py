"""The option `ignore`: names of layers and `re:` patterns, matched against vLLM's names of the layers.

`is_ignored` decides. `matches` says the same of one entry, for warnings of entries that mean no layer.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def check_entries(ignore: list[str]) -> None:
    """ValueError for a pattern that does not compile, and for a name with a `*`, which names nothing."""
    for entry in ignore:
        if not entry.startswith("re:") and "*" in entry:
            pattern = re.escape(entry).replace(r"\*", ".*")
            raise ValueError(f'rowint8: ignore holds {entry!r}; a name is taken as it is, a pattern is "re:{pattern}"')
        try:
            re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"rowint8: ignore holds {entry!r}, not a regular expression: {error}") from error


def is_ignored(prefix: str, ignore: list[str], packed: Mapping[str, list[str]]) -> bool:
    """Whether a layer is left alone. Of a merged layer (`packed`: qkv, gate_up) entries must name all parts or none."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    return should_ignore_layer(prefix, ignore=ignore, fused_mapping=packed)


def renamed(ignore: list[str], hf_to_vllm_mapper: Any) -> list[str]:
    """The entries with names as vLLM has them. Patterns are the user's to write; so are names that vLLM drops."""
    return [entry if entry.startswith("re:") else _renamed(entry, hf_to_vllm_mapper) for entry in ignore]


def _renamed(name: str, hf_to_vllm_mapper: Any) -> str:
    """A mapper renames tensors, and may look for the dot behind a layer's name."""
    mapped = hf_to_vllm_mapper.apply_list([f"{name}.weight"])
    return mapped[0].removesuffix(".weight") if mapped else name


def matches(name: str, entry: str) -> bool:
    """Whether an entry means the layer that vLLM, or the checkpoint, calls `name`."""
    return name == entry if not entry.startswith("re:") else re.match(entry.removeprefix("re:"), name) is not None


def warn_of_unmatched(model: nn.Module, config: Any) -> None:
    """Logs every entry that means no layer of the model, with the name that is nearest."""
    ignore = config.quant_config.ignore
    if not ignore or config.parallel_config.pipeline_parallel_size > 1:  # other ranks hold other layers
        return
    names = layer_names(model, config.quant_config.packed_modules_mapping)
    for entry in ignore:
        if not any(matches(name, entry) for name in names):
            logger.warning("rowint8: ignore holds %r, which is no layer of this model%s", entry, _advice(entry, names))


def layer_names(model: nn.Module, packed: dict[str, list[str]]) -> list[str]:
    """Names that `ignore` may hold: of linear, experts and vocabulary layers, and of the parts of merged ones."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    names = []
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase | RoutedExperts | VocabParallelEmbedding):
            prefix = getattr(layer, "prefix", None) or name.removesuffix(".routed_experts")
            block, dot, last = prefix.rpartition(".")
            names += [prefix, *(block + dot + part for part in packed.get(last, []))]
    return names


def _advice(entry: str, names: Iterable[str]) -> str:
    if entry.startswith("re:"):
        plain = entry.removeprefix("re:")
        anywhere = any(re.search(plain, name) for name in names)
        return f'; a pattern matches from the start of a name: "re:.*{plain}"' if anywhere else ""
    inside = any(f".{entry}." in f".{name}." for name in names)
    if inside:
        return f'; a name is full, and a pattern for it is "re:.*{re.escape(entry)}"'
    nearest = get_close_matches(entry, names, 1, 0)
    return f"; the nearest is {nearest[0]!r}" if nearest else ""
