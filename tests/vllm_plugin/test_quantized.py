"""A checkpoint of `rowint8 quantize` in the real vLLM: found without a flag, the same as quantizing while loading."""

import pytest
from transformers import GPTBigCodeConfig, Phi3Config, Qwen2Config, Qwen3MoeConfig

from rowint8.eval.quantize import checkpoint as job
from rowint8.eval.quantize.source import open_source
from tests.vllm_plugin.harness import TINY, make_tiny

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WITHOUT_FLAG = {**TINY, "quantization": None}


def test_stored_equals_online_bit_for_bit(driver, tmp_path):
    model = make_tiny(tmp_path / "model", Qwen2Config, max_shard_size="100KB", tie_word_embeddings=True)
    source = open_source(model)
    assert len(source.shards) > 1
    job.write_checkpoint(source, tmp_path / "int8", "rowint8", (), job.round_to_nearest(source.layers))
    online = driver.works(model)
    assert driver.works(tmp_path / "int8", llm=WITHOUT_FLAG) == online
    plain = driver.works(model, llm=WITHOUT_FLAG)
    assert plain["logprobs"] != online["logprobs"], "unquantized weights must be seen in the logprobs"


def test_stored_experts_equal_online_bit_for_bit(driver, tmp_path):
    shape = dict(num_experts=5, moe_intermediate_size=96, num_experts_per_tok=2, head_dim=32)
    model = make_tiny(tmp_path / "model", Qwen3MoeConfig, **shape)
    source = open_source(model)
    job.write_checkpoint(source, tmp_path / "int8", "rowint8", (), job.round_to_nearest(source.layers))
    assert driver.works(tmp_path / "int8", llm=WITHOUT_FLAG)["logprobs"] == driver.works(model)["logprobs"]


MERGED_IN_THE_FILES = {
    "phi3 (no bias)": (Phi3Config, {"pad_token_id": 0}),
    "gpt-bigcode (one key head, biases)": (
        GPTBigCodeConfig,
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    ),
}


@pytest.mark.parametrize("case", MERGED_IN_THE_FILES)
def test_parts_that_the_checkpoint_holds_as_one_tensor(driver, tmp_path, case):
    """vLLM cuts such a weight, and its scale, and loads the parts in turn."""
    config_class, shape = MERGED_IN_THE_FILES[case]
    model = make_tiny(tmp_path / "model", config_class, **shape)
    source = open_source(model)
    job.write_checkpoint(source, tmp_path / "int8", "rowint8", (), job.round_to_nearest(source.layers))
    assert driver.works(tmp_path / "int8", llm=WITHOUT_FLAG) == driver.works(model)
