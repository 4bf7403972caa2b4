"""The language model head in INT8, and the embedding too where the two are tied: one copy of [vocabulary, K] for both.

A row is a token: the head multiplies by all of them, the embedding gathers and scales some, and rotates them back where
activations are INT8.
vLLM ties in two ways, by model and version: `lm_head = lm_head.tie_weights(embed_tokens)` makes them one module, and
`lm_head.weight = embed_tokens.weight` shares a parameter that is not loaded yet. Both end with one pair of tensors (see
`TiedHeadMethod`).
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import embedding
from vllm.model_executor.layers.linear import LinearMethodBase

from rowint8.kernels.activations import rotate
from rowint8.vllm_plugin import attached
from rowint8.vllm_plugin.linear import RowInt8LinearMethod
from rowint8.vllm_plugin.loading import Int8Method


class RowInt8VocabMethod(RowInt8LinearMethod):
    """A head, or an embedding that is also the head."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """As for a linear layer; vLLM's padding of the vocabulary is no part of the checkpoint."""
        super().create_weights(layer, *args, **kwargs)
        indices = layer.shard_indices
        rows = indices.org_vocab_end_index - indices.org_vocab_start_index
        for parameter in layer.parameters(recurse=False):
            attached.expect_rows(parameter, rows)
        attached.set_vocab_layer(layer)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """int64 token ids [...] -> [..., K] in the layer's dtype, each row scaled in fp32 and rounded once."""
        rows = embedding(input_, layer.weight).float() * embedding(input_, layer.weight_scale[:, None]).float()
        return (rotate(rows, self.block) if self.block else rows).to(layer.params_dtype)


class RowInt8EmbeddingMethod(RowInt8VocabMethod):
    """An embedding alone: its rows are gathered as they are, and no product needs a kernel."""

    multiplies = False

    def _rotation_block(self, k: int, k_of_rank: int) -> None:
        """Nothing is multiplied, so nothing is rotated."""


class TiedHeadMethod(LinearMethodBase, Int8Method):
    """A head whose weights are those of the embedding; it has none of its own."""

    owns_weights = False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Registers nothing: the checkpoint fills the embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The embedding's module itself becomes the head."""
        return embed_tokens

    def process_weights_after_loading(self, layer: Any) -> None:
        """Shares the embedding's tensors, where the model shared its parameter before it was quantized."""
        embed_tokens = attached.vocab_layer(layer.weight)
        layer.register_parameter("weight", embed_tokens.weight)
        layer.register_parameter("weight_scale", embed_tokens.weight_scale)
        self.multiply = embed_tokens.quant_method.apply

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., vocabulary] in x's dtype."""
        return self.multiply(layer, x, bias)
