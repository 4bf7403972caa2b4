"""The quantization config `rowint8`: which layers of a model become INT8, and where their numbers come from.

It is read from `quantization_config` in the checkpoint's config.json, which `--hf-overrides` can set or replace:

    vllm serve MODEL --quantization rowint8
    vllm serve MODEL --hf-overrides '{"quantization_config":
        {"quant_method": "rowint8", "serialized": false, "ignore": ["re:.*down_proj"]}}'

Options:
    quant_method: "rowint8".
    serialized: whether the checkpoint already holds INT8 weights (default true; see `linear` for its tensors). With
        false, and with `--quantization rowint8` on a checkpoint without a quantization_config, weights are quantized
        while they load.
    ignore: layers to leave unquantized: full names as in the checkpoint ("model.layers.0.mlp.down_proj") or "re:" and
        a regular expression that matches from the start of the name. The parts of a merged layer (q, k and v; gate and
        up) must be ignored together.

The language model head, embeddings and the experts of mixture-of-experts layers stay unquantized.
"""

import re
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from rowint8.kernels.ops import ACTIVATION_DTYPES

logger = init_logger(f"vllm.{__name__}")

_OPTIONS = ("quant_method", "serialized", "ignore")


class RowInt8Config(QuantizationConfig):
    """INT8 weights with one fp16 scale per output row, for every linear layer that `ignore` does not name."""

    def __init__(self, serialized: bool = False, ignore: list[str] | None = None) -> None:
        super().__init__()
        self.serialized = serialized
        self.ignore = ignore or []

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
        """Reads `quantization_config`; ValueError for an unknown option or a value of the wrong type."""
        unknown = sorted(set(config) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"rowint8: unknown option {', '.join(unknown)}; accepted are {', '.join(_OPTIONS)}")
        serialized, ignore = config.get("serialized", True), config.get("ignore", [])
        if not isinstance(serialized, bool):
            raise ValueError(f"rowint8: serialized must be true or false, got {serialized!r}")
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ValueError(f'rowint8: ignore must be a list of names or "re:" patterns, got {ignore!r}')
        _compile_patterns(ignore)
        return cls(serialized, ignore)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Turns full checkpoint names into vLLM's; patterns are the user's to write."""
        patterns = [name for name in self.ignore if name.startswith("re:")]
        names = [name for name in self.ignore if not name.startswith("re:")]
        self.ignore = patterns + hf_to_vllm_mapper.apply_list(names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer of the model; None leaves it to vLLM's unquantized one."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

        from rowint8.vllm_plugin.linear import RowInt8LinearMethod

        if isinstance(layer, RoutedExperts):
            logger.warning_once("rowint8 quantizes dense layers only: the experts of this model stay unquantized")
        if not isinstance(layer, LinearBase):
            return None
        if should_ignore_layer(prefix, ignore=self.ignore, fused_mapping=self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        return RowInt8LinearMethod(prefix, self.serialized)


def _compile_patterns(ignore: list[str]) -> None:
    for name in ignore:
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"rowint8: ignore holds {name!r}, not a regular expression: {error}") from error
