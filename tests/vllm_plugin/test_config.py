"""Registration and options of the vLLM plugin, without an engine."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from rowint8 import vllm_plugin
from rowint8.vllm_plugin import config as config_module
from rowint8.vllm_plugin import ignore
from rowint8.vllm_plugin.config import RowInt8Config

pytestmark = pytest.mark.newest


def test_importing_the_plugin_loads_nothing_heavy():
    code = "import sys, rowint8.vllm_plugin; print(*sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == []


def test_register_is_idempotent():
    from vllm.model_executor.layers import quantization
    from vllm.platforms import current_platform

    vllm_plugin.register()
    vllm_plugin.register()
    assert quantization.QUANTIZATION_METHODS.count("rowint8") == 1
    assert (current_platform.supported_quantization or ["rowint8"]).count("rowint8") == 1
    assert quantization.get_quantization_config("rowint8") is RowInt8Config


def test_entry_point_leads_to_register():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="rowint8")
    assert entry.load() is vllm_plugin.register


def test_a_checkpoint_with_a_config_is_serialized_unless_it_says_otherwise():
    assert RowInt8Config().serialized is False
    assert RowInt8Config.from_config({"quant_method": "rowint8"}).serialized is True
    config = RowInt8Config.from_config({"quant_method": "rowint8", "serialized": False, "ignore": ["re:.*o_proj"]})
    assert (config.serialized, config.ignore) == (False, ["re:.*o_proj"])


def test_defaults_are_the_same_with_and_without_a_config():
    for config in (RowInt8Config(), RowInt8Config.from_config({"quant_method": "rowint8"})):
        assert (config.lm_head, config.fuse_swiglu, config.fuse_norm) == (False, True, True)
    flags = {"lm_head": True, "fuse_swiglu": False, "fuse_norm": False}
    config = RowInt8Config.from_config({"quant_method": "rowint8", **flags})
    assert (config.lm_head, config.fuse_swiglu, config.fuse_norm) == (True, False, False)


def test_every_option_is_documented():
    guide = Path(__file__).resolve().parents[2].joinpath("docs", "vllm.md").read_text()
    for option in config_module._OPTIONS:
        assert f"\n| `{option}` | " in guide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ignored": []},
            "unknown option ignored; accepted are quant_method, ignore, activations, rotation_block, serialized,",
        ),
        ({"bits": 4, "group_size": 32}, "unknown option bits, group_size; accepted are"),
        ({"serialized": "no"}, "serialized must be true or false, got 'no'"),
        ({"ignore": "lm_head"}, "ignore must be a list of names"),
        ({"activations": "fp8"}, "activations must be \"int8\" or left out, got 'fp8'"),
        ({"rotation_block": 64}, 'rotation_block is for INT8 activations; add "activations": "int8"'),
        ({"activations": "int8", "rotation_block": 96}, "rotation_block must be one of 16, 32, 64, 128, 256, got 96"),
        (
            {"activations": "int8", "rotation_block": 64.0},
            "rotation_block must be one of 16, 32, 64, 128, 256, got 64.0",
        ),
        ({"lm_head": "int8"}, "lm_head must be true or false, got 'int8'"),
        ({"fuse_swiglu": 1}, "fuse_swiglu must be true or false, got 1"),
        ({"lm_head": True, "ignore": ["lm_head"]}, "lm_head is true, but ignore holds 'lm_head'"),
        ({"lm_head": True, "ignore": ["re:.*"]}, "lm_head is true, but ignore holds 're:.*'"),
        ({"ignore": ["re:("]}, "ignore holds 're:(', not a regular expression"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match="rowint8") as error:
        RowInt8Config.from_config({"quant_method": "rowint8", **options})
    assert message in str(error.value)


def test_choosing_a_method_changes_no_setting_of_vllm():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    vllm_plugin.register()
    config = VllmConfig()
    config.kernel_config.ir_op_priority.fused_add_rms_norm = ["native"]
    chosen, passes = RowInt8Config(), dict(config.compilation_config.inductor_compile_config)
    layer = MergedColumnParallelLinear.__new__(MergedColumnParallelLinear)
    with set_current_vllm_config(config):
        method = chosen.get_quant_method(layer, "model.layers.0.mlp.gate_up_proj")
    assert (method.prefix, method.config) == ("model.layers.0.mlp.gate_up_proj", chosen)
    assert config.compilation_config.inductor_compile_config == passes
    assert config.kernel_config.ir_op_priority.fused_add_rms_norm == ["native"]


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("model.layers.0.mlp.down_proj", True),
        ("language_model.model.layers.0.self_attn.qkv_proj", True),
        ("visual.blocks.0.attn.qkv", False),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", False),
        ("thinker.audio_tower.layers.0.fc1", False),
        ("score", False),
        ("model.classifier", False),
        ("model.layers.0.mlp.gate", False),
        ("model.layers.0.mlp.gate_proj", True),
    ],
)
def test_towers_and_what_chooses_stay_as_they_are(name, quantized):
    assert (chosen_method(RowInt8Config(), name) == "RowInt8LinearMethod") is quantized


def test_towers_are_quantized_on_demand():
    assert chosen_method(RowInt8Config(towers=True), "visual.blocks.0.attn.qkv") == "RowInt8LinearMethod"


def chosen_method(config: RowInt8Config, name: str) -> str:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    with set_current_vllm_config(VllmConfig()):
        return type(config.get_quant_method(ReplicatedLinear.__new__(ReplicatedLinear), name)).__name__


def test_layers_that_the_quantization_config_names_are_vllms():
    from vllm.model_executor.layers.quantization import base_config

    if not hasattr(base_config, "resolve_quant_method"):
        pytest.skip("this vLLM has no --quantization-config beside a method of a plugin")
    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    def method(name, serialized=False, **args):
        config = RowInt8Config(serialized)
        config.online_quantization_config = OnlineQuantizationConfig(QuantizationConfigArgs(**args))
        return chosen_method(config, name)

    assert method("a.down_proj", targets={"re:.*down_proj": "mxfp8"}) == "UnquantizedLinearMethod"
    assert method("a.o_proj", targets={"re:.*down_proj": "mxfp8"}) == "RowInt8LinearMethod"
    assert method("a.o_proj", linear="mxfp8") == "UnquantizedLinearMethod"
    assert method("a.o_proj", linear="mxfp8", ignore=["a.o_proj"]) == "RowInt8LinearMethod"
    assert method("a.o_proj", moe="mxfp8") == "RowInt8LinearMethod"
    with pytest.raises(ValueError, match="rowint8: --quantization-config sets linear without a weight"):
        method("a.o_proj", linear={"activation": "mxfp8"})
    with pytest.raises(ValueError, match=r"names a\.o_proj, which the checkpoint holds in INT8"):
        method("a.o_proj", serialized=True, linear="mxfp8")


def test_ignored_names_follow_the_models_renaming_and_patterns_stay():
    from vllm.model_executor.models.utils import WeightsMapper

    config = RowInt8Config(ignore=["model.layers.0.mlp.down_proj", "re:model.*o_proj"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert sorted(config.ignore) == ["language_model.model.layers.0.mlp.down_proj", "re:model.*o_proj"]


def test_a_name_with_a_star_is_refused_with_the_pattern_it_may_mean():
    for name, pattern in {
        "model.layers.*.mlp.down_proj": r"re:model\.layers\..*\.mlp\.down_proj",
        "*": "re:.*",
        "*down_proj": "re:.*down_proj",
        "model.layers.*": r"re:model\.layers\..*",
    }.items():
        with pytest.raises(ValueError, match="a name is taken as it is") as error:
            RowInt8Config.from_config({"quant_method": "rowint8", "ignore": [name]})
        assert str(error.value).endswith(f'a pattern is "{pattern}"')


MAPPERS = {
    "a part of the name": ({"substr": {".self_attention.dense.": ".self_attn.o_proj."}}, "h.0.self_attention.dense"),
    "a last part with a dot behind it": ({"substr": {".fc1.": ".mlp.fc1."}}, "encoder.layers.0.fc1"),
    "a prefix with a dot behind it": ({"prefix": {"lm_head.": "language_model.lm_head."}}, "lm_head"),
    "an ending": ({"suffix": {".w2.weight": ".down_proj.weight"}}, "vision.projector.w2"),
}


@pytest.mark.parametrize("case", MAPPERS)
def test_names_are_renamed_as_their_weights_are(case):
    from vllm.model_executor.models.utils import WeightsMapper

    renaming, name = MAPPERS[case]
    mapper = WeightsMapper(**{f"orig_to_new_{kind}": mapping for kind, mapping in renaming.items()})
    config = RowInt8Config(ignore=[name, "re:.*fc1", "other.fc2"])
    config.apply_vllm_mapper(mapper)
    assert [f"{config.ignore[0]}.weight"] == mapper.apply_list([f"{name}.weight"])
    assert config.ignore[0] != name
    assert config.ignore[1:] == ["re:.*fc1", "other.fc2"]


NAMES = [
    *("model.embed_tokens", "lm_head", "model.layers.0.mlp.experts"),
    *("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"),
]
UNMATCHED = {
    "model.layers.0.mlp.dwn_proj": "; the nearest is 'model.layers.0.mlp.down_proj'",
    "model.layers.0.mlp": '; a name is full, and a pattern for it is "re:.*model\\.layers\\.0\\.mlp"',
    "down_proj": '; a name is full, and a pattern for it is "re:.*down_proj"',
    "re:down_proj": '; a pattern matches from the start of a name: "re:.*down_proj"',
    "re:.*vision": "",
}


@pytest.mark.parametrize("entry", UNMATCHED)
def test_an_entry_that_means_no_layer_is_warned_of_with_what_it_may_mean(monkeypatch, entry):
    lines = []
    monkeypatch.setattr(ignore.logger, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(ignore, "layer_names", lambda model, packed: NAMES)
    known = ["lm_head", "re:.*experts", "model.layers.0.self_attn.q_proj", entry]
    for ranks in (1, 2):
        config = SimpleNamespace(
            quant_config=RowInt8Config(ignore=known), parallel_config=SimpleNamespace(pipeline_parallel_size=ranks)
        )
        ignore.warn_of_unmatched(None, config)
    assert lines == [f"rowint8: ignore holds {entry!r}, which is no layer of this model{UNMATCHED[entry]}"]
