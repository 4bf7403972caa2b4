"""How an INT8 weight lies in a checkpoint, and what config.json says about it.

`rowint8`, read by the vLLM plugin and the small engine:
    <layer>.weight         int8 [N, K]
    <layer>.weight_scale   fp16 [N]

`compressed-tensors`, its `pack-quantized` format with 8 bits and one symmetric scale a channel, for vLLM without a
plugin, transformers and others (where they compute in bf16 they round the scales to bf16):
    <layer>.weight_packed  int32 [N, ceil(K / 4)], four values + 128 in each, the first in the lowest byte
    <layer>.weight_scale   fp32 [N, 1]
    <layer>.weight_shape   int64 [2]: N, K
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rowint8.kernels.quantize import Int8Weight


@dataclass(frozen=True)
class CheckpointFormat:
    """One way of writing INT8 weights down."""

    tensors: Callable[[str, "Int8Weight"], "dict[str, Tensor]"]
    """(layer name, weight) -> the layer's tensors by their names in the file."""
    config: Callable[[Sequence[str]], dict[str, Any]]
    """Names of the linear layers that stay unquantized -> `quantization_config`."""


def rowint8_tensors(layer: str, weight: "Int8Weight") -> "dict[str, Tensor]":
    return {f"{layer}.weight": weight.values, f"{layer}.weight_scale": weight.scale}


def rowint8_config(ignore: Sequence[str]) -> dict[str, Any]:
    return {"quant_method": "rowint8", **({"ignore": list(ignore)} if ignore else {})}


def packed_tensors(layer: str, weight: "Int8Weight") -> "dict[str, Tensor]":
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        f"{layer}.weight_packed": pack_to_int32(weight.values, num_bits=8),
        f"{layer}.weight_scale": weight.scale.float()[:, None],
        f"{layer}.weight_shape": torch.tensor(weight.values.shape),
    }


_ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


def packed_config(ignore: Sequence[str]) -> dict[str, Any]:
    return _compressed("pack-quantized", {"weights": _ROWS}, ignore)


def w8a8_config() -> dict[str, Any]:
    """INT8 rows that vLLM multiplies by INT8 tokens, each with a scale of its own."""
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return _compressed("int-quantized", {"weights": _ROWS, "input_activations": tokens}, ())


def _compressed(form: str, group: dict[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ["lm_head", *ignore],
    }


FORMATS = {
    "rowint8": CheckpointFormat(rowint8_tensors, rowint8_config),
    "compressed-tensors": CheckpointFormat(packed_tensors, packed_config),
}
