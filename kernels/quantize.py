"""INT8 weights with one scale per output row: the format, and the only place where a weight is rounded.

    scale[n]     = max_k |weight[n, k]| / 127        stored as fp16
    values[n, k] = round(weight[n, k] / scale[n])    with the *stored* scale, half to even, in [-127, 127]

Rows that INT8 activations are multiplied by are rotated first (`activations`); the rule is the same.

A row's numbers depend on that row alone, so rows can be stacked (q, k and v; gate and up), split by tensor parallelism
along N, or quantized in blocks, and the result is the same bits. -128 is never used: the code is symmetric.

Edges, each decided once here:
- A zero row has scale 0 and values 0.
- The scale is rounded to the nearest fp16. Where the spacing of fp16 is so coarse (subnormal scales, rows whose largest
  weight is below 0.0078) that the largest weight would round beyond 127, the next larger fp16 is stored instead:
  nothing is ever clipped.
- A row too large for an fp16 scale (|weight| > 8.3e6), NaN and Inf are errors that name the tensor and the row.
- N or K may be 0, 1, odd, or anything else.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rowint8.kernels.activations import INT8_MAX, rotate

BLOCK_ELEMENTS = 1 << 20
"""Weights are quantized this many elements at a time, which bounds the extra memory to about 10 MB."""

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Int8Weight(NamedTuple):
    """A linear weight of shape [N, K] (N outputs, K inputs)."""

    values: Tensor
    """int8 [N, K], row-major, in [-127, 127]."""
    scale: Tensor
    """fp16 [N]; weight[n, k] is approximately values[n, k] * scale[n]."""

    @property
    def nbytes(self) -> int:
        """Bytes stored: N * K + 2 * N."""
        return self.values.nbytes + self.scale.nbytes


def quantize_rowwise(
    weight: Tensor, *, name: str = "weight", block: int = 1, absmax: Tensor | None = None
) -> Int8Weight:
    """Rounds a [N, K] weight (fp32, bf16 or fp16, any device) to INT8 with one fp16 scale per row.

    Beyond the result it needs memory for one block of rows, never an fp32 copy of the whole weight.

    Args:
        name: of the tensor, for messages.
        block: columns that are rotated together before they are rounded, for INT8 activations (`activations.rotate`).
        absmax: fp32 [N], largest magnitudes of the whole rows, where the weight is a part of their columns.

    Raises:
        TypeError: the dtype is none of the three.
        ValueError: the weight is not a matrix, holds NaN or Inf, or a row is too large for an fp16 scale. The message
            names the tensor and the row.
    """
    _check_weight(weight, name)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float16, device=weight.device)
    for rows in _row_blocks(weight):
        part = rotate(weight[rows], block)
        largest = _absmax(part) if absmax is None else absmax[rows]
        _refuse_rows(~torch.isfinite(largest), "holds NaN or Inf", name, rows.start)
        scale[rows] = _row_scale(largest, name, rows.start)
        values[rows] = round_to_scale(part, scale[rows])
    return Int8Weight(values, scale)


def row_absmax(weight: Tensor, *, name: str = "weight", block: int = 1) -> Tensor:
    """Largest magnitude of each row, fp32 [N], of a [N, K] weight rotated by `block`; arguments as `quantize_rowwise`.

    NaN and Inf come out as they are.
    """
    _check_weight(weight, name)
    largest = torch.empty(weight.shape[0], device=weight.device)
    for rows in _row_blocks(weight):
        largest[rows] = _absmax(rotate(weight[rows], block))
    return largest


def _check_weight(weight: Tensor, name: str) -> None:
    if weight.dtype not in _WEIGHT_DTYPES:
        raise TypeError(f"{name}: cannot quantize {weight.dtype}; accepted are float32, bfloat16 and float16")
    if weight.dim() != 2:
        raise ValueError(f"{name}: expected a matrix [N, K], got shape {list(weight.shape)}")


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    rows_per_block = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows_per_block):
        yield slice(start, start + rows_per_block)


def _absmax(block: Tensor) -> Tensor:
    """Largest magnitude of each row [n] of an fp32 block [n, K]."""
    if block.shape[1] == 0:
        return block.new_zeros(block.shape[0])
    return torch.linalg.vector_norm(block, ord=float("inf"), dim=1)


def _row_scale(absmax: Tensor, name: str, first_row: int) -> Tensor:
    """The stored scale fp16 [n] for rows whose largest magnitudes are `absmax` fp32 [n] (see the module's edges)."""
    exact = absmax / INT8_MAX
    _refuse_rows(exact > torch.finfo(torch.float16).max, "is too large for an fp16 scale", name, first_row)
    scale = exact.half()
    would_clip = (absmax >= (INT8_MAX + 0.5) * scale.float()) & (absmax > 0)
    return torch.where(would_clip, _next_fp16(scale), scale)


def round_to_scale(block: Tensor, scale: Tensor) -> Tensor:
    """int8 [n, K] from an fp32 block [n, K] and its stored scales fp16 [n]; rows of scale 0 become 0."""
    divisor = torch.where(scale == 0, 1, scale.float())
    return (block / divisor[:, None]).round_().to(torch.int8)


def check_stored(weight: Int8Weight, name: str) -> None:
    """ValueError unless each row has a scale as `quantize_rowwise` writes it: finite, and 0 over zeros alone."""
    values, scale = weight
    bad = ~(scale.isfinite() & (scale >= 0))
    zero = (scale == 0).nonzero().flatten()
    bad[zero] = values[zero].any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        kind = "no scale of a row that is not zeros" if scale[row] == 0 else "not a finite scale >= 0"
        raise ValueError(f"{name}_scale: row {row} is {float(scale[row])}, {kind}; fetch or quantize the model again")


def dequantize(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """values * scale as a [N, K] tensor, computed in fp32 and rounded once to `dtype`."""
    return (weight.values.float() * weight.scale.float()[:, None]).to(dtype)


def _next_fp16(scale: Tensor) -> Tensor:
    """The next larger fp16 of each finite, non-negative entry (its bit pattern plus one)."""
    return (scale.view(torch.int16) + 1).view(torch.float16)


def _refuse_rows(bad: Tensor, reason: str, name: str, first_row: int) -> None:
    """Raises ValueError for the first row marked in `bad` bool [n]."""
    if bad.any():
        row = first_row + int(bad.nonzero()[0])
        raise ValueError(f"{name}: row {row} {reason}; only finite weights up to 8.3e6 can be quantized")
