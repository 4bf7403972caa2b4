"""A copy of a model with attention heads of zeros added, so that a number of GPUs can divide its heads.

SmolLM2-135M has 9 heads over 3 of keys and values, which two GPUs cannot split; with 12 over 4 they can. An added head
reads nothing and its output is multiplied by zeros, so the copy computes what the model computes: also with INT8
weights, as a row of zeros stays one and a column of zeros changes no row's scale.
"""

from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.folder import refuse_existing, whole_folder


def copy_with_padded_heads(model: Path, out: Path, ranks: int) -> None:
    """Writes the model in folder `model`, of the Llama kind, to the folder `out`, which must not exist.

    It appears whole or not at all.

    Raises:
        EvalError: `out` exists or cannot be written, or the model is of another kind.
    """
    from torch.nn.functional import pad
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    refuse_existing(out)
    disable_progress_bar()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)
    if not isinstance(plain, LlamaForCausalLM) or plain.config.attention_bias:
        raise EvalError(f"{model} is {type(plain).__name__}; accepted is LlamaForCausalLM without attention bias")
    weights, config = plain.state_dict(), plain.config
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    config.num_key_value_heads = -(-kv_heads // ranks) * ranks
    config.num_attention_heads = config.num_attention_heads // kv_heads * config.num_key_value_heads
    padded = LlamaForCausalLM._from_config(config, dtype=plain.dtype)
    for name, slot in padded.state_dict().items():
        added = [size - had for size, had in zip(slot.shape, weights[name].shape, strict=True)]
        weights[name] = pad(weights[name], [end for rows in added[::-1] for end in (0, rows)])
    padded.load_state_dict(weights)
    with whole_folder(out) as folder:
        padded.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
