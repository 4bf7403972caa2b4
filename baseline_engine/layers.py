"""The parts of a decoder layer. Inference only: weights are buffers, filled by `checkpoint` through their slots."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rowint8.baseline_engine.config import ModelConfig
from rowint8.kernels import ops
from rowint8.kernels.quantize import quantize_rowwise


class Slot(NamedTuple):
    """The place of one checkpoint tensor in the model."""

    shape: tuple[int, ...]
    load: Callable[[Tensor], None]
    """Copies (or quantizes) a tensor of that shape into its place; ValueError where it holds NaN or Inf."""


@dataclass(frozen=True)
class WeightFormat:
    """How linear weights are held and multiplied."""

    dtype: torch.dtype
    """Of activations, and of every weight that is not INT8."""
    device: torch.device
    int8: bool = False
    """Hold linear weights as INT8 rows (`rowint8.kernels`)."""
    fused: bool = False
    """Run gate, up, SiLU and product as the one operator `ops.swiglu`; needs `int8` and no MLP bias."""

    def linear(self, in_features: int, out_features: int, bias: bool) -> "Linear":
        kind = Int8Linear if self.int8 else Linear
        return kind(in_features, out_features, bias, self.dtype, self.device)


class Linear(nn.Module):
    """x [..., K] -> x W^T + b [..., N]. The rows of W may stack several matrices of the checkpoint (q, k and v)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.in_features = in_features
        self._allocate(out_features, dtype, device)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.register_buffer("weight", torch.empty(out_features, self.in_features, dtype=dtype, device=device))

    def slots(self, parts: dict[str, int]) -> dict[str, Slot]:
        """Slots of the matrices stacked in this layer, top to bottom, given as name -> number of rows."""
        slots, start = {}, 0
        for name, size in parts.items():
            rows = slice(start, start + size)
            start += size
            load = partial(self._load_rows, rows, f"{name}.weight")
            slots[f"{name}.weight"] = Slot((size, self.in_features), load)
            if self.bias is not None:
                slots[f"{name}.bias"] = copy_slot(self.bias[rows], f"{name}.bias")
        return slots

    def _load_rows(self, rows: slice, name: str, weight: Tensor) -> None:
        copy_slot(self.weight[rows], name).load(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear(Linear):
    """The same over INT8 rows: values int8 [N, K], scale fp16 [N]. A matrix is quantized while it is loaded."""

    values: Tensor
    scale: Tensor

    def _allocate(self, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        values = torch.empty(out_features, self.in_features, dtype=torch.int8, device=device)
        self.register_buffer("values", values)
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float16, device=device))

    def _load_rows(self, rows: slice, name: str, weight: Tensor) -> None:
        self.values[rows], self.scale[rows] = quantize_rowwise(weight, name=name)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.values, self.scale, self.bias)


def copy_slot(place: Tensor, name: str) -> Slot:
    """A slot that copies into `place`, cast to its dtype."""

    def load(tensor: Tensor) -> None:
        place.copy_(tensor)
        if place.numel() and not torch.linalg.vector_norm(place, ord=math.inf).isfinite():
            raise ValueError(f"{name}: holds NaN or Inf as {str(place.dtype).removeprefix('torch.')}")

    return Slot(tuple(place.shape), load)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467), in fp32 inside."""

    weight: Tensor

    def __init__(self, size: int, eps: float, form: WeightFormat):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(size, dtype=form.dtype, device=form.device))

    def slots(self, name: str) -> dict[str, Slot]:
        return {f"{name}.weight": copy_slot(self.weight, f"{name}.weight")}

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Step(NamedTuple):
    """What every layer of one forward pass shares. B rows (requests) of T tokens each; D is the head size."""

    positions: Tensor
    """int64 [B, T]: each token's place in its sequence, and so in the cache."""
    rows: Tensor
    """int64 [B, 1]: 0 .. B-1, the rows of the cache."""
    cos: Tensor
    """[B, T, 1, D], as is `sin`: see `rotation`."""
    sin: Tensor
    mask: Tensor | None
    """Decode: [B, 1, 1, L], 0 where a row may look and -inf elsewhere. Prefill: None, tokens 0 .. T-1 look back."""


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, fp32 [D / 2] (RoFormer, arXiv:2104.09864).

    Llama 3's scaling slows the pairs that turn less than `low_freq_factor` times within the original context by
    `factor`, leaves those that turn more than `high_freq_factor` times, and blends in between.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, D] for `rotate`; the sign of the rotation's upper half is folded into sin."""
    angles = positions[..., None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[d], x[d + D/2]) of [B, T, heads, D] by its angle. Rolling by D/2 swaps the halves."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) over a cache; q, k and v are one matrix product."""

    def __init__(self, config: ModelConfig, form: WeightFormat):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = config.attention_bias
        self.qkv = form.linear(config.hidden_size, self.q_size + 2 * self.kv_size, bias)
        self.o = form.linear(self.q_size, config.hidden_size, bias)
        self.hidden_size = config.hidden_size

    def slots(self, prefix: str) -> dict[str, Slot]:
        qkv = {f"{prefix}.q_proj": self.q_size, f"{prefix}.k_proj": self.kv_size, f"{prefix}.v_proj": self.kv_size}
        return self.qkv.slots(qkv) | self.o.slots({f"{prefix}.o_proj": self.hidden_size})

    def forward(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, T, hidden]; keys, values [B, kv heads, length, D], whose entries at the positions are written."""
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, -1, self.head_dim)
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        q, k = rotate(qk, step.cos, step.sin).split((self.num_heads, self.num_kv_heads), dim=2)
        keys[step.rows, :, step.positions] = k
        values[step.rows, :, step.positions] = v
        if step.mask is None:
            return self.o(attend_causal(q, k, v).reshape(batch, tokens, -1))
        return self.o(attend_cache(q, keys, values, step.mask).reshape(batch, tokens, -1))


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token looks at itself and back: q [B, T, heads, D], k and v [B, T, kv heads, D] -> [B, T, heads, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def attend_cache(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One new token a row looks at the cache: q [B, 1, heads, D] -> [B, 1, heads, D].

    The query heads that share a key head are passed as so many queries of that head: each key is read once (on the CPU
    in bf16 this is faster than `enable_gqa`). Only as many entries as the mask is wide are read.
    """
    kv_heads, length = keys.shape[1], mask.shape[-1]
    grouped = q.view(q.shape[0], kv_heads, -1, q.shape[-1])
    out = F.scaled_dot_product_attention(grouped, keys[:, :, :length], values[:, :, :length], attn_mask=mask)
    return out.reshape(q.shape)


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202); gate and up are one matrix product, or one fused operator."""

    def __init__(self, config: ModelConfig, form: WeightFormat):
        super().__init__()
        self.fused = form.fused
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_up = form.linear(self.hidden_size, 2 * self.intermediate_size, config.mlp_bias)
        self.down = form.linear(self.intermediate_size, self.hidden_size, config.mlp_bias)

    def slots(self, prefix: str) -> dict[str, Slot]:
        gate_up = {f"{prefix}.gate_proj": self.intermediate_size, f"{prefix}.up_proj": self.intermediate_size}
        return self.gate_up.slots(gate_up) | self.down.slots({f"{prefix}.down_proj": self.hidden_size})

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and isinstance(self.gate_up, Int8Linear):
            return self.down(ops.swiglu(x, self.gate_up.values, self.gate_up.scale))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
