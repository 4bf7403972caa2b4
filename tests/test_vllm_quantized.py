"""A checkpoint of `rowint8 quantize` in the real vLLM: found without a flag, the same as quantizing while loading."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rowint8.eval import quantize_checkpoint as job
from rowint8.eval.processes import run_quietly, vllm_environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPTS = [[1, 5, 9, 23, 77, 30], [4, 100, 3], [90]]
LLM = {"enforce_eager": True, "max_model_len": 128, "dtype": "float32", "skip_tokenizer_init": True}
SAMPLING = {"temperature": 0, "max_tokens": 16, "logprobs": 5, "ignore_eos": True, "detokenize": False}


def write_model(folder):
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        vocab_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size="100KB")
    return folder


def generate(folder, scratch, **options):
    request = {"llm": {"model": str(folder), **LLM, **options}, "sampling": SAMPLING, "prompts": PROMPTS}
    env = vllm_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    result = scratch / f"{folder.name}.json"
    run_quietly([sys.executable, "-m", "rowint8.eval.vllm_run", str(result)], env, json.dumps(request))
    return json.loads(result.read_text())


def test_stored_equals_online_bit_for_bit(tmp_path):
    model = write_model(tmp_path / "model")
    source = job.open_source(model)
    job.write_checkpoint(source, tmp_path / "int8", "rowint8", (), job.round_to_nearest(source.layers))
    online = generate(model, tmp_path, quantization="rowint8")
    stored = generate(tmp_path / "int8", tmp_path)
    plain = generate(model, tmp_path)
    assert stored == online
    assert plain != online, "unquantized weights must be seen in the logprobs"
