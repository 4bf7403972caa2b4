"""The quantization config `rowint8`: which layers of a model become INT8, and where their numbers come from.

It is read from `quantization_config` in the checkpoint's config.json, which `--hf-overrides` can set or replace:

    vllm serve MODEL --quantization rowint8
    vllm serve MODEL --hf-overrides '{"quantization_config":
        {"quant_method": "rowint8", "serialized": false, "ignore": ["re:.*down_proj"]}}'

docs/vllm.md has the table of options. Some layers are never quantized: routers, which choose among experts (they are
small, and one wrong choice is no rounding error), and the last layers of classifiers and rerankers, for the same
reason; the embedding of a pooling model that is the head too; a head that vLLM computes in a dtype of its own
(`head_dtype`).
"""

import re
from typing import Any, Literal

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from rowint8.kernels.activations import BLOCKS, LARGEST_BLOCK
from rowint8.kernels.checks import ACTIVATION_DTYPES
from rowint8.kernels.tiles.card import why_slow_in_int8
from rowint8.vllm_plugin import compat
from rowint8.vllm_plugin.ignore import check_entries, is_ignored, matches, renamed

logger = init_logger(f"vllm.{__name__}")

_FLAGS = {
    "serialized": True,
    "lm_head": False,
    "embed_tokens": False,
    "towers": False,
    "fuse_swiglu": True,
    "fuse_norm": True,
}
_OPTIONS = ("quant_method", "ignore", "activations", "rotation_block", *_FLAGS)
_CHOOSERS = ("gate", "router", "score", "classifier")
_TOWER = re.compile(r"vision|visual|image|img|audio|speech|sound|whisper|vpm|sam_model|tower")


class RowInt8Config(QuantizationConfig):
    """INT8 weights with one fp16 scale per output row, for every linear layer that `ignore` does not name."""

    def __init__(
        self,
        serialized: bool = False,
        ignore: list[str] | None = None,
        activations: Literal["int8"] | None = None,
        rotation_block: int = LARGEST_BLOCK,
        lm_head: bool = _FLAGS["lm_head"],
        embed_tokens: bool = _FLAGS["embed_tokens"],
        towers: bool = _FLAGS["towers"],
        fuse_swiglu: bool = _FLAGS["fuse_swiglu"],
        fuse_norm: bool = _FLAGS["fuse_norm"],
    ) -> None:
        super().__init__()
        self.serialized = serialized
        self.ignore = ignore or []
        self.activations = activations
        self.rotation_block = rotation_block
        self.lm_head = lm_head
        self.embed_tokens = embed_tokens
        self.towers = towers
        self.fuse_swiglu = fuse_swiglu
        self.fuse_norm = fuse_norm

    def options(self) -> dict[str, Any]:
        """What the user chose, by the names of the options."""
        return {name: getattr(self, name) for name in _OPTIONS[1:]}

    def get_name(self) -> Any:
        return "rowint8"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(ACTIVATION_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: the kernels multiply in bf16 on tensor cores."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RowInt8Config":
        """Reads `quantization_config`; ValueError for an unknown option, a wrong value, or two that contradict."""
        unknown = sorted(set(config) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"rowint8: unknown option {', '.join(unknown)}; accepted are {', '.join(_OPTIONS)}")
        flags = {name: config.get(name, default) for name, default in _FLAGS.items()}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"rowint8: {name} must be true or false, got {value!r}")
        ignore = config.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ValueError(f'rowint8: ignore must be a list of names or "re:" patterns, got {ignore!r}')
        check_entries(ignore)
        rotation = _rotation(config)
        ignores_head = [entry for entry in ignore if matches("lm_head", entry) or entry.endswith(".lm_head")]
        if flags["lm_head"] and ignores_head:
            raise ValueError(f'rowint8: lm_head is true, but ignore holds {ignores_head[0]!r}; set "lm_head": false')
        return cls(ignore=ignore, **rotation, **flags)

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM when it has the options and knows the model; ValueError where a mode cannot be had."""
        self._refuse_other_rows(model_name)
        capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
        obstacle = why_slow_in_int8((capability[0], capability[1])) if capability else None
        if self.activations and obstacle and self.serialized:
            raise ValueError(f"rowint8: the checkpoint is for INT8 activations, and on this card {obstacle}")
        if self.activations and obstacle:
            logger.warning_once(f"rowint8: activations are not rounded to INT8: on this card {obstacle}")
            self.activations = None
        if compat.batch_invariant() and not self.activations:
            raise ValueError(
                "rowint8: VLLM_BATCH_INVARIANT=1 cannot be held with INT8 weights alone, whose sums depend on the "
                'number of tokens; set "activations": "int8" in quantization_config'
            )

    def _refuse_other_rows(self, model_name: str) -> None:
        """ValueError where options would read rotated rows as plain ones, or the other way round."""
        if not self.serialized:
            return
        stored = (get_hf_file_to_dict("config.json", model_name, revision=None) or {}).get("quantization_config") or {}
        if stored.get("quant_method") != "rowint8":
            return
        theirs = {"activations": None, "rotation_block": LARGEST_BLOCK} | _rotation(stored)
        for name, value in theirs.items():
            ours = getattr(self, name)
            if ours != value:
                raise ValueError(f"rowint8: the checkpoint has {name} {value!r}, the options say {ours!r}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Turns names of the checkpoint into vLLM's."""
        self.ignore = renamed(self.ignore, hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer of the model; None leaves it to vLLM's unquantized one. It changes nothing else."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from rowint8.vllm_plugin.linear import RowInt8LinearMethod

        if isinstance(layer, VocabParallelEmbedding):
            return self._get_vocab_method(layer, prefix)
        if not isinstance(layer, LinearBase | RoutedExperts):
            return None
        vllm_quantizes = compat.quantized_by_vllm(self, layer, prefix)
        if vllm_quantizes and self.serialized:
            raise ValueError(f"rowint8: --quantization-config names {prefix}, which the checkpoint holds in INT8")
        if isinstance(layer, RoutedExperts):
            return None if vllm_quantizes else self._get_experts_method(layer, prefix)
        in_tower = not self.towers and any(_TOWER.search(part) for part in prefix.split("."))
        if vllm_quantizes or in_tower or self._ignores(prefix) or _is_chooser(layer, prefix):
            return UnquantizedLinearMethod()
        return RowInt8LinearMethod(prefix, self)

    def _ignores(self, prefix: str) -> bool:
        return is_ignored(prefix, self.ignore, self.packed_modules_mapping)

    def _get_experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from rowint8.vllm_plugin.moe import make_experts_method, why_unquantized

        if self._ignores(prefix):
            return None
        reason = why_unquantized(layer)
        if reason and self.serialized:
            raise ValueError(f"rowint8: {prefix} cannot be read in INT8: {reason}")
        method = None if reason else make_experts_method(layer, prefix, self)
        if method and compat.batch_invariant() and not method.blocks:
            reason = "VLLM_BATCH_INVARIANT=1, and sums of INT8 weights alone depend on the number of tokens"
        if reason:
            logger.warning_once(f"rowint8: the experts of this model stay unquantized: {reason}")
            return None
        return method

    def _get_vocab_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from rowint8.vllm_plugin.lm_head import RowInt8EmbeddingMethod, RowInt8VocabMethod, TiedHeadMethod

        config = get_current_vllm_config()
        model = config.model_config
        tied = getattr(model.hf_text_config, "tie_word_embeddings", False)
        is_head = isinstance(layer, ParallelLMHead)
        of_full_size = (layer.org_vocab_size, layer.embedding_dim) == (model.get_vocab_size(), model.get_hidden_size())
        if not is_head and not tied:
            takes = self.embed_tokens and of_full_size
            return RowInt8EmbeddingMethod(prefix or "embed_tokens", self) if takes else None
        if self.embed_tokens and not self.lm_head and not is_head:
            logger.warning_once('rowint8: the embedding is the head too; "lm_head": true makes it INT8')
        computed_in_its_dtype = model.runner_type != "pooling" and model.head_dtype == model.dtype
        if not (self.lm_head and of_full_size and computed_in_its_dtype):
            return None
        if compat.quantizes_head_for_drafter(config):
            logger.warning_once("rowint8: the head stays unquantized: draft_lm_head_quantization needs it so")
            return None
        if is_head and tied:
            return TiedHeadMethod()
        return RowInt8VocabMethod(prefix or "embed_tokens", self)


def _rotation(config: dict[str, Any]) -> dict[str, Any]:
    """The options of INT8 activations among those of a `quantization_config`; ValueError where they are wrong."""
    activations, block = config.get("activations"), config.get("rotation_block")
    if activations not in (None, "int8"):
        raise ValueError(f'rowint8: activations must be "int8" or left out, got {activations!r}')
    if block is None:
        return {"activations": activations}
    if activations is None:
        raise ValueError('rowint8: rotation_block is for INT8 activations; add "activations": "int8"')
    if type(block) is not int or block not in BLOCKS:
        raise ValueError(f"rowint8: rotation_block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    return {"activations": activations, "rotation_block": block}


def _is_chooser(layer: nn.Module, prefix: str) -> bool:
    """Whether the layer chooses among experts or classes."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    name = prefix.split(".")[-1]
    return isinstance(layer, ReplicatedLinear) and (name in _CHOOSERS or name.endswith("_experts_gate"))
