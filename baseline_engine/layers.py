"""The parts of a decoder layer. Inference only: weights are buffers, filled by `checkpoint` through their places."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.kernels import ops
from rowint8.kernels.activations import rotate as hadamard
from rowint8.kernels.activations import rotation_block
from rowint8.kernels.quantize import Int8Weight, dequantize, quantize_rowwise


class Place(NamedTuple):
    """The place of one checkpoint tensor in the model."""

    shape: tuple[int, ...]
    load: Callable[[Tensor], None]
    """Copies (or quantizes) a tensor of that shape into its place; ValueError where it holds NaN or Inf."""


@dataclass(frozen=True)
class WeightFormat:
    """How linear weights are held and multiplied."""

    dtype: torch.dtype
    """The dtype of activations, and of every weight that is not INT8."""
    device: torch.device
    int8: bool = False
    """Hold linear weights as INT8 rows (`rowint8.kernels`)."""
    fused: bool = False
    """Run gate, up, SiLU and product as the one operator `ops.swiglu`, and on CUDA sum and norm as
    `ops.add_rms_norm`; needs `int8` and no MLP bias."""
    int8_lm_head: bool = False
    rotation: int | None = None
    """For INT8 activations: the largest block of columns that are rotated together, in rows and in tokens."""

    def linear(self, in_features: int, out_features: int, bias: bool) -> "Linear":
        if self.int8:
            return Int8Linear(in_features, out_features, bias, self.dtype, self.device, self.rotation)
        return Linear(in_features, out_features, bias, self.dtype, self.device)

    def embedding(self, vocab_size: int, hidden_size: int) -> "Linear":
        return Linear(hidden_size, vocab_size, False, self.dtype, self.device)

    def vocabulary(self, vocab_size: int, hidden_size: int) -> "Linear":
        """An output layer, which may be the embedding too."""
        if self.int8_lm_head:
            return Int8Linear(hidden_size, vocab_size, False, self.dtype, self.device, self.rotation)
        return Linear(hidden_size, vocab_size, False, self.dtype, self.device)


class Int8Tokens(NamedTuple):
    """Rotated tokens in INT8, as a norm hands them to the layers that multiply them."""

    values: Tensor
    """int8 [T, K]"""
    scale: Tensor
    """fp32 [T]"""


class Linear(nn.Module):
    """x [..., K] -> x W^T + b [..., N]. The rows of W may stack several matrices of the checkpoint (q, k and v)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.in_features, self.dtype = in_features, dtype
        self._allocate(out_features, device)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def _allocate(self, out_features: int, device: torch.device) -> None:
        self.register_buffer("weight", torch.empty(out_features, self.in_features, dtype=self.dtype, device=device))

    def places(self, parts: dict[str, int]) -> dict[str, Place]:
        """Places of the matrices stacked in this layer, top to bottom, given as name -> number of rows."""
        places, start = {}, 0
        for name, size in parts.items():
            rows = slice(start, start + size)
            start += size
            places |= self._weight_places(name, rows)
            if self.bias is not None:
                places[f"{name}.bias"] = copy_into(self.bias[rows], f"{name}.bias")
        return places

    def _weight_places(self, name: str, rows: slice) -> dict[str, Place]:
        return {f"{name}.weight": copy_into(self.weight[rows], f"{name}.weight")}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def lookup(self, rows: Tensor) -> Tensor:
        """Rows of the weight, as an embedding gives them: ids [T] -> [T, K]."""
        return F.embedding(rows, self.weight)


class Int8Linear(Linear):
    """The same over INT8 rows: values int8 [N, K], scale fp16 [N]. A matrix is quantized while it is loaded.

    With a `rotation` the rows are rotated, and tokens are rounded to INT8 before they are multiplied.
    """

    values: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        rotation: int | None,
    ):
        super().__init__(in_features, out_features, bias, dtype, device)
        self.block = None if rotation is None else rotation_block(in_features, rotation)

    def _allocate(self, out_features: int, device: torch.device) -> None:
        values = torch.empty(out_features, self.in_features, dtype=torch.int8, device=device)
        self.register_buffer("values", values)
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float16, device=device))

    def _weight_places(self, name: str, rows: slice) -> dict[str, Place]:
        values, scale = self.values[rows], self.scale[rows]

        def load(weight: Tensor) -> None:
            quantized = quantize_rowwise(weight, name=f"{name}.weight", block=self.block or 1)
            values.copy_(quantized.values)
            scale.copy_(quantized.scale)

        return {f"{name}.weight": Place(tuple(values.shape), load)}

    def forward(self, x: "Tensor | Int8Tokens") -> Tensor:
        if self.block is None and isinstance(x, Tensor):
            return ops.linear(x, self.values, self.scale, self.bias)
        return ops.linear_int8(*self._tokens(x), self.values, self.scale, self.bias, self.dtype)

    def swiglu(self, x: "Tensor | Int8Tokens") -> Tensor:
        """silu(gate) * up, where the rows stack gate over up and there is no bias."""
        if self.block is None and isinstance(x, Tensor):
            return ops.swiglu(x, self.values, self.scale)
        return ops.swiglu_int8(*self._tokens(x), self.values, self.scale, self.dtype)

    def _tokens(self, x: "Tensor | Int8Tokens") -> "Int8Tokens":
        if isinstance(x, Int8Tokens):
            return x
        assert self.block is not None, "INT8 tokens are for rotated rows"
        return Int8Tokens(*ops.quantize_tokens(x, self.block))

    def lookup(self, rows: Tensor) -> Tensor:
        plain = dequantize(Int8Weight(F.embedding(rows, self.values), self.scale[rows]))
        return (hadamard(plain, self.block) if self.block else plain).to(self.dtype)


def copy_into(target: Tensor, name: str) -> Place:
    """A place that copies into `target`, cast to its dtype."""

    def load(tensor: Tensor) -> None:
        target.copy_(tensor)
        if target.numel() and target.is_floating_point() and not _all_finite(target):
            raise ValueError(f"{name}: holds NaN or Inf as {str(target.dtype).removeprefix('torch.')}")

    return Place(tuple(target.shape), load)


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(tensor, ord=math.inf).isfinite())


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467), in fp32 inside.

    Where it feeds a layer of INT8 activations alone, and is one operator with the sum, it hands out INT8 tokens.
    """

    weight: Tensor

    def __init__(self, size: int, eps: float, weight_format: WeightFormat, hands_out_int8: bool = False):
        super().__init__()
        self.eps = eps
        rotation = weight_format.rotation if hands_out_int8 else None
        self.block = rotation and rotation_block(size, rotation)
        self.fused = (
            weight_format.fused and weight_format.device.type == "cuda"
        )  # on the CPU nothing is won, and torch rounds once less
        self.register_buffer("weight", torch.empty(size, dtype=weight_format.dtype, device=weight_format.device))

    def places(self, name: str) -> dict[str, Place]:
        return {f"{name}.weight": copy_into(self.weight, f"{name}.weight")}

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor | Int8Tokens, Tensor]:
        """(norm(x + residual), x + residual)."""
        if self.fused and self.block:
            values, scale, residual = ops.add_rms_norm_int8(x, residual, self.weight, self.eps, self.block)
            return Int8Tokens(values, scale), residual
        if self.fused:
            return ops.add_rms_norm(x, residual, self.weight, self.eps)
        # The same sum, in fp32, is one that Inductor does not hand to the product in front, which copies the residual.
        compiling = torch.compiler.is_compiling()
        residual = (x.float() + residual).to(x.dtype) if compiling else x + residual
        return self(residual), residual


class Positions(NamedTuple):
    """What every layer needs to know of the T tokens of a step."""

    cos: Tensor
    """[T, 1, D], as is `sin`: see `rotation`."""
    sin: Tensor
    slots: Tensor
    """int64 [T]: where in the cache each token's key and value go, counted in tokens."""


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
    """cos and sin [T, 1, D] for `rotate`; the sign of the rotation's upper half is folded into sin."""
    angles = positions[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[d], x[d + D/2]) of [T, heads, D] by its angle. Rolling by D/2 swaps the halves."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """The products around grouped-query attention (arXiv:2305.13245); q, k and v are one."""

    def __init__(self, config: ModelConfig, weight_format: WeightFormat):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv = weight_format.linear(config.hidden_size, self.q_size + 2 * self.kv_size, config.qkv_bias)
        self.o = weight_format.linear(self.q_size, config.hidden_size, config.o_bias)
        self.q_norm = RmsNorm(self.head_dim, config.rms_norm_eps, weight_format) if config.qk_norm else None
        self.k_norm = RmsNorm(self.head_dim, config.rms_norm_eps, weight_format) if config.qk_norm else None
        self.hidden_size = config.hidden_size

    def places(self, prefix: str) -> dict[str, Place]:
        qkv = {f"{prefix}.q_proj": self.q_size, f"{prefix}.k_proj": self.kv_size, f"{prefix}.v_proj": self.kv_size}
        places = self.qkv.places(qkv) | self.o.places({f"{prefix}.o_proj": self.hidden_size})
        if self.q_norm is not None and self.k_norm is not None:
            places |= self.q_norm.places(f"{prefix}.q_norm") | self.k_norm.places(f"{prefix}.k_norm")
        return places

    def queries(self, x: Tensor | Int8Tokens, positions: Positions, keys: Tensor, values: Tensor) -> Tensor:
        """x [T, hidden] -> queries [T, heads, D]; puts the tokens' keys and values into the layer's cache.

        keys, values: [cache slots, kv heads, D].
        """
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.num_heads, self.num_kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, positions.cos, positions.sin).split((self.num_heads, self.num_kv_heads), dim=1)
        keys.index_copy_(0, positions.slots, k)
        values.index_copy_(0, positions.slots, v)
        return q


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202); gate and up are one matrix product, or one fused operator."""

    def __init__(self, config: ModelConfig, weight_format: WeightFormat):
        super().__init__()
        self.fused = weight_format.fused
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_up = weight_format.linear(self.hidden_size, 2 * self.intermediate_size, config.mlp_bias)
        self.down = weight_format.linear(self.intermediate_size, self.hidden_size, config.mlp_bias)

    def places(self, prefix: str) -> dict[str, Place]:
        gate_up = {f"{prefix}.mlp.{part}_proj": self.intermediate_size for part in ("gate", "up")}
        return self.gate_up.places(gate_up) | self.down.places({f"{prefix}.mlp.down_proj": self.hidden_size})

    def forward(self, x: Tensor | Int8Tokens) -> Tensor:
        if self.fused and isinstance(self.gate_up, Int8Linear):
            return self.down(self.gate_up.swiglu(x))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
