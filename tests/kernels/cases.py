"""Fresh random operands of a product, for the tests of the kernels, and experts that the engines are compared with."""

from typing import Any

import torch
from torch import Tensor

from rowint8.kernels import ops
from rowint8.kernels.activations import rotation_block
from rowint8.kernels.quantize import Int8Weight, quantize_rowwise

Case = tuple[Tensor, Int8Weight, Tensor | None]


def case(m: int, n: int, k: int, dtype: torch.dtype, device: str = "cuda", bias: bool = False) -> Case:
    """Activations [m, k], a weight [n, k] that keeps their size, and a bias [n] or None."""
    weight = quantize_rowwise(torch.randn(n, k, device=device) / k**0.5)
    b = torch.randn(n, device=device).to(dtype) if bias else None
    return torch.randn(m, k, device=device).to(dtype), weight, b


def absolute(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Case:
    """The same without signs: its product bounds what rounding can do to the real one."""
    return x.abs(), Int8Weight(weight.values.abs(), weight.scale), None if bias is None else bias.abs()


def rotated_experts(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """(values, scale, block) of a weight [E, N, K] for INT8 activations."""
    block = rotation_block(weight.shape[2])
    values, scale = quantize_rowwise(weight.flatten(0, 1), block=block)
    return values.view(weight.shape), scale.view(weight.shape[:2]), block


class RoundedExperts(torch.nn.Module):
    """transformers' experts of a layer with INT8 weights and activations, through the operator."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        parts = experts.gate_up_proj.data, experts.down_proj.data
        (*gate_up, block), (*down, hidden_block) = map(rotated_experts, parts)
        self.layer, self.blocks = (*gate_up, *down), (block, hidden_block)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return ops.experts_int8(x, *self.layer, weights, ids, None, *self.blocks)


def round_experts_(model: torch.nn.Module) -> None:
    """Puts them in the place of those of a transformers model."""
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            model.set_submodule(name, RoundedExperts(module))
