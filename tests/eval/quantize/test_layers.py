"""rowint8.eval.quantize.layers: what becomes INT8 in models of many kinds, and what `--ignore` may say."""

import threading
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconConfig,
    FalconH1Config,
    FalconMambaConfig,
    GPTNeoXConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
    Starcoder2Config,
)

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.layers import ignored_layers, linear_layers, time_limit

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "num_attention_heads": 4,
}
TAKEN = {
    "opt": (OPTConfig, {"ffn_dim": 96}, "q_proj k_proj v_proj out_proj fc1 fc2"),
    "phi": (PhiConfig, {}, "q_proj k_proj v_proj dense fc1 fc2"),
    "phi3": (Phi3Config, {"pad_token_id": 0}, "qkv_proj o_proj gate_up_proj down_proj"),
    "gpt-neox": (GPTNeoXConfig, {}, "query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "falcon": (FalconConfig, {}, "query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "starcoder2": (Starcoder2Config, {"num_key_value_heads": 2}, "q_proj k_proj v_proj o_proj c_fc c_proj"),
    "mamba": (MambaConfig, {}, ""),
    "mamba 2": (Mamba2Config, {"num_heads": 8, "head_dim": 16}, "in_proj out_proj"),
    "falcon-mamba": (FalconMambaConfig, {}, ""),
    "jamba": (
        JambaConfig,
        {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": 2},
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    ),
    "bamba": (
        BambaConfig,
        {"attn_layer_indices": [1], "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 16},
        "in_proj out_proj q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    ),
    "falcon-h1": (
        FalconH1Config,
        {"num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
        "in_proj out_proj q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    ),
    "recurrent gemma": (
        RecurrentGemmaConfig,
        {"lru_width": 64},
        "linear_x linear_y linear_out gate_proj up_proj down_proj",
    ),
    "qwen2-moe": (
        Qwen2MoeConfig,
        {"num_experts": 4, "num_key_value_heads": 2, "mlp_only_layers": [0]},
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_vllm_builds_unquantized_is_left_alone(case):
    config_class, options, kinds = TAKEN[case]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_class(**(SMALL | options)))
    taken, others = linear_layers(model)
    assert {layer.rpartition(".")[2] for layer in taken} == set(kinds.split())
    linears = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linears - taken - others <= {"lm_head", "embed_out"}
    assert not taken & others


PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
LAYERS = [f"model.layers.{n}.{part}" for n in range(12) for part in (*PARTS, "mlp.down_proj")]


def refusal(*entries):
    with pytest.raises(EvalError) as caught:
        ignored_layers(LAYERS, entries)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        "down_proj",
        "model.layers.0.mlp",
        "model.layers.0.mlp.dwn_proj",
        "model.layers.99.mlp.down_proj",
        "model.layers.0.mlp.down_proj.weight",
        " model.layers.0.mlp.down_proj",
        "MODEL.LAYERS.0.MLP.DOWN_PROJ",
        "lm_head",
        "",
        "re:down_proj",
        "re:.*\\.down$",
        "re:.*nothing",
        "x" * 5000,
        "\udcff",
        "a\nb",
    ],
    ids=lambda entry: ascii(entry)[:40],
)
def test_an_entry_that_names_no_layer_is_refused_with_one_that_is(entry):
    message = refusal(entry)
    assert "matches no linear layer; layers are named like 'model.layers." in message
    assert len(message) < 300


def test_the_nearest_name_is_told():
    assert refusal("model.layers.7.mlp.dwn_proj").endswith("'model.layers.7.mlp.down_proj'")
    assert refusal("re:down_proj").endswith("down_proj'")


@pytest.mark.parametrize(
    "entry", ["model.layers.*.mlp.down_proj", "*", "*down_proj", "model.layers.?.mlp.up_proj", "[0-9]"]
)
def test_wildcards_are_not_taken_for_patterns(entry):
    assert "a plain name has no wildcards; give a pattern such as 're:" in refusal(entry)


@pytest.mark.parametrize("entries", [["re:.*"], ["re:"], ["re:model"], ["re:.*self_attn", "re:.*mlp"], LAYERS])
def test_ignoring_everything_is_refused(entries):
    assert "--ignore names all linear layers" in refusal(*entries)


@pytest.mark.parametrize(
    "entry", ["re:(", "re:[", "re:*", "re:a{99999999999}", "re:(?P<a>x)(?P<a>y)", "re:" + "(" * 5000]
)
def test_broken_patterns_are_refused(entry):
    assert "is not a regular expression: " in refusal(entry)


@pytest.mark.parametrize("entry", ["re:(.*.*)*x", "re:(\\w+\\.?)*!", "re:([a-z.0-9]+)+$^", "re:(.|..)*Z"])
def test_patterns_that_backtrack_for_ever_are_refused(entry):
    start = time.monotonic()
    assert "takes too long to match" in refusal(entry)
    assert time.monotonic() - start < 10


def test_a_time_limit_leaves_no_alarm_behind():
    with pytest.raises(TimeoutError), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(sorted(ignored_layers(LAYERS, ["re:.*down_proj"]))))
    thread.start()
    thread.join()
    assert len(outcome[0]) == 12
