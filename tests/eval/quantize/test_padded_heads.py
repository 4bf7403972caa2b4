"""rowint8.eval.quantize.padded_heads: more heads, the same function."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.padded_heads import copy_with_padded_heads
from rowint8.kernels.quantize import quantize_rowwise
from tests.tiny_models import write_tiny


def test_the_copy_computes_the_same(smollm2, tmp_path):
    copy_with_padded_heads(smollm2, tmp_path / "padded", 2)
    plain, padded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (smollm2, tmp_path / "padded")
    )
    assert (padded.config.num_attention_heads, padded.config.num_key_value_heads) == (12, 4)
    ids = torch.randint(0, 49152, (1, 40))
    torch.testing.assert_close(padded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    attention = [model.model.layers[3].self_attn for model in (plain, padded)]
    rows, scales = zip(*(quantize_rowwise(layer.o_proj.weight) for layer in attention), strict=True)
    assert torch.equal(*scales)
    assert torch.equal(rows[0], rows[1][:, : rows[0].shape[1]])
    assert not rows[1][:, rows[0].shape[1] :].any()


def test_what_it_cannot_pad_is_refused(tmp_path):
    model = write_tiny(tmp_path / "mistral", MistralConfig)
    with pytest.raises(EvalError, match="accepted is LlamaForCausalLM"):
        copy_with_padded_heads(model, tmp_path / "padded", 2)
    with pytest.raises(EvalError, match="mistral exists already; remove it"):
        copy_with_padded_heads(model, tmp_path / "mistral", 2)
