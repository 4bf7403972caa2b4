"""The Llama decoder (arXiv:2302.13971): embedding, layers, norm, logits."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rowint8.baseline_engine.config import ModelConfig
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.layers import (
    Attention,
    RmsNorm,
    Slot,
    Step,
    SwiGlu,
    WeightFormat,
    copy_slot,
    rope_frequencies,
    rotation,
)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, form: WeightFormat):
        super().__init__()
        self.input_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, form)
        self.attention = Attention(config, form)
        self.post_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, form)
        self.mlp = SwiGlu(config, form)

    def slots(self, prefix: str) -> dict[str, Slot]:
        return (
            self.input_norm.slots(f"{prefix}.input_layernorm")
            | self.attention.slots(f"{prefix}.self_attn")
            | self.post_norm.slots(f"{prefix}.post_attention_layernorm")
            | self.mlp.slots(f"{prefix}.mlp")
        )

    def forward(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, T, hidden] -> the same shape; keys, values [B, kv heads, length, D] are this layer's cache."""
        x = x + self.attention(self.input_norm(x), step, keys, values)
        return x + self.mlp(self.post_norm(x))


LayerFunction = Callable[[DecoderLayer, Tensor, Step, Tensor, Tensor], Tensor]


class LlamaModel(nn.Module):
    """Weights are allocated in their final format and filled by `checkpoint.load_model`.

    Embedding and output layer stay in the activation dtype; tied, they are one tensor.
    """

    embedding: Tensor
    lm_head: Tensor

    def __init__(self, config: ModelConfig, form: WeightFormat):
        super().__init__()
        self.config, self.form = config, form
        shape = (config.vocab_size, config.hidden_size)
        self.register_buffer("embedding", torch.empty(shape, dtype=form.dtype, device=form.device))
        self.layers = nn.ModuleList(DecoderLayer(config, form) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, form)
        tied = config.tie_word_embeddings
        self.register_buffer("lm_head", self.embedding if tied else torch.empty_like(self.embedding))
        self.frequencies = rope_frequencies(config, form.device)

    def slots(self) -> dict[str, Slot]:
        """The place of every tensor of a Hugging Face checkpoint, by its name there."""
        slots = {"model.embed_tokens.weight": copy_slot(self.embedding, "model.embed_tokens.weight")}
        for index, layer in enumerate(self._layers()):
            slots |= layer.slots(f"model.layers.{index}")
        slots |= self.norm.slots("model.norm")
        if not self.config.tie_word_embeddings:
            slots["lm_head.weight"] = copy_slot(self.lm_head, "lm_head.weight")
        return slots

    def _layers(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as held, scales included; tied tensors count once."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KvCache,
        mask: Tensor | None,
        run_layer: LayerFunction = DecoderLayer.forward,
    ) -> Tensor:
        """Token ids and positions int64 [B, T] -> the last layer's output [B, T, hidden]; fills the cache.

        The mask is that of `layers.Step`: None for a prompt from position 0, [B, 1, 1, L] for one new token a row.
        `run_layer` may be a compiled `DecoderLayer.forward`.
        """
        cos, sin = rotation(positions, self.frequencies, self.form.dtype)
        step = Step(positions, cache.rows, cos, sin, mask)
        x = F.embedding(tokens, self.embedding)
        for layer, (keys, values) in zip(self._layers(), cache.layers, strict=True):
            x = run_layer(layer, x, step, keys, values)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary] in the activation dtype."""
        return F.linear(self.norm(hidden), self.lm_head)
