"""Fresh random operands of a product, for the tests of the kernels."""

import torch
from torch import Tensor

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
