"""The decoder of Llama (arXiv:2302.13971) and its relatives: embedding, layers, norm, logits."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from rowint8.baseline_engine.experts import MixtureOfExperts
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.layers import (
    Attention,
    Place,
    Positions,
    RmsNorm,
    SwiGlu,
    WeightFormat,
    rope_frequencies,
    rotation,
)
from rowint8.baseline_engine.model_config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [T, heads, D], keys, values of one layer's cache) -> [T, heads, D]; see `attention`."""


class DecoderLayer(nn.Module):
    """r += x; x = attention(norm(r)); r += x; x = mlp(norm(r)).

    The residual stream r is added to where the next norm reads it, in the next layer if need be: one pass over memory
    where sum and norm are one operator. The layer comes in two halves because attention, between them, is not compiled.
    """

    def __init__(self, config: ModelConfig, weight_format: WeightFormat):
        super().__init__()
        self.input_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, weight_format, hands_out_int8=True)
        self.attention = Attention(config, weight_format)
        experts, size, eps = config.experts, config.hidden_size, config.rms_norm_eps
        self.post_norm = RmsNorm(size, eps, weight_format, hands_out_int8=experts is None)
        self.mlp = MixtureOfExperts(experts, size, weight_format) if experts else SwiGlu(config, weight_format)

    def places(self, prefix: str) -> dict[str, Place]:
        return (
            self.input_norm.places(f"{prefix}.input_layernorm")
            | self.attention.places(f"{prefix}.self_attn")
            | self.post_norm.places(f"{prefix}.post_attention_layernorm")
            | self.mlp.places(prefix)
        )

    def before_attention(
        self, x: Tensor, residual: Tensor, positions: Positions, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (queries [T, heads, D], residual); the cache receives keys and values."""
        normed, residual = self.input_norm.add(x, residual)
        return self.attention.queries(normed, positions, keys, values), residual

    def after_attention(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """attended [T, heads, D] -> (x, residual), each [T, hidden]."""
        x, residual = self.post_norm.add(self.attention.o(attended.flatten(1)), residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Weights are allocated in their final format and filled by `checkpoint.load_model`.

    Embedding and output layer stay in the activation dtype unless the format says otherwise; tied, they are one.
    """

    config: ModelConfig
    weight_format: WeightFormat

    def __init__(self, config: ModelConfig, weight_format: WeightFormat):
        super().__init__()
        self.config, self.weight_format = config, weight_format
        shape = (config.vocab_size, config.hidden_size)
        self.lm_head = weight_format.vocabulary(*shape)
        self.embedding = self.lm_head if config.tie_word_embeddings else weight_format.embedding(*shape)
        self.layers = nn.ModuleList(DecoderLayer(config, weight_format) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, weight_format)
        sketched = weight_format.device.type == "meta"  # for its shapes; torch takes seconds to learn to compute so
        self.frequencies = torch.empty(0) if sketched else rope_frequencies(config, weight_format.device)
        self._before, self._after = DecoderLayer.before_attention, DecoderLayer.after_attention

    def compile_layers(self) -> None:
        """From now on both halves of a layer are compiled, at their first run, for all layers and numbers of tokens."""
        self._before = torch.compile(DecoderLayer.before_attention, fullgraph=True, dynamic=True)
        self._after = torch.compile(DecoderLayer.after_attention, fullgraph=True, dynamic=True)

    def places(self) -> dict[str, Place]:
        """The place of every tensor of a Hugging Face checkpoint, by its name there."""
        places = self.embedding.places({"model.embed_tokens": self.config.vocab_size})
        for index, layer in enumerate(self._layers()):
            places |= layer.places(f"model.layers.{index}")
        places |= self.norm.places("model.norm")
        if not self.config.tie_word_embeddings:
            places |= self.lm_head.places({"lm_head": self.config.vocab_size})
        return places

    def _layers(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as held, scales included; tied tensors count once."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: KvCache, attend: Attend) -> Tensor:
        """Token ids, positions and cache slots, each [T] -> normed hidden states [T, hidden]; fills the cache.

        The tokens may belong to any number of requests: only `attend` knows which.
        """
        where = Positions(*rotation(positions, self.frequencies, self.weight_format.dtype), slots)
        x = self.embedding.lookup(tokens)
        residual = torch.zeros_like(x)
        for layer, slots_of_layer, blocks in zip(self._layers(), cache.slots, cache.layers, strict=True):
            queries, residual = self._before(layer, x, residual, where, *slots_of_layer)
            x, residual = self._after(layer, attend(queries, *blocks), residual)
        normed, _ = self.norm.add(x, residual)
        assert isinstance(normed, Tensor), "the last norm hands out no INT8"
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary] in the activation dtype."""
        return self.lm_head(hidden)
