"""What the plugin asks of the installed vLLM, and the line that it says when a model is built."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import CompilationMode
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import LinearBase

from rowint8.vllm_plugin import compat
from rowint8.vllm_plugin.loading import Int8Method
from rowint8.vllm_plugin.moe import why_unquantized
from rowint8.vllm_plugin.passes import Passes
from rowint8.vllm_plugin.summary import sizes, summary

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.25.9", True),
        (compat.OLDEST + ".0", False),
        ("0.32.0+cpu", False),
        (compat.NEWEST + ".1rc1.dev5", False),
        ("0.34.0", True),
        ("1.0.0", True),
        ("0.1.dev1+g0123456", False),
        ("dev", False),
    ],
)
def test_a_version_outside_the_tested_ones_gets_one_line(monkeypatch, version, said):
    lines = []
    monkeypatch.setattr(compat.logger, "info_once", lambda text, *values: lines.append(text % values))
    compat.note_version(version)
    assert lines == [f"rowint8: tested with vLLM {compat.OLDEST} to {compat.NEWEST}; this is {version}"] * said


def test_no_other_file_compares_versions_or_tries_imports():
    files = [path for path in Path(compat.__file__).parent.glob("*.py") if path.name != "compat.py"]
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        assert "ImportError" not in text, path
        assert "packaging" not in text, path
        assert "vllm.__version__ " not in text, path


class Pruned:
    """As vLLM's class for experts of a pruned checkpoint."""

    activation, swiglu_limit, apply_router_weight_on_input = None, None, False


def test_experts_whose_class_takes_no_quantized_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(compat, "refuses_quantized_experts", lambda layer: isinstance(layer, Pruned))
    assert why_unquantized(Pruned()) == "Pruned takes no quantized ones"


def test_the_class_for_pruned_experts_is_known_where_vllm_has_it():
    assert not compat.refuses_quantized_experts(torch.nn.Linear(2, 2))
    substitution = pytest.importorskip("vllm.model_executor.layers.fused_moe.expert_substitution")
    pruned = substitution.SubstitutedRoutedExperts.__new__(substitution.SubstitutedRoutedExperts)
    assert compat.refuses_quantized_experts(pruned)


def test_a_drafter_may_need_the_head_unquantized():
    speculative = SimpleNamespace(draft_lm_head_quantization="fp8")
    assert compat.quantizes_head_for_drafter(SimpleNamespace(speculative_config=speculative))
    for other in (None, SimpleNamespace(), SimpleNamespace(draft_lm_head_quantization=None)):
        assert not compat.quantizes_head_for_drafter(SimpleNamespace(speculative_config=other))


def int8_layer(rows: int, columns: int, is_gate_up: bool = False) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"))
    layer.quant_method = Int8Method()
    layer.quant_method.is_gate_up = is_gate_up
    return layer


def test_the_line_gives_bytes_before_and_after_and_what_is_fused():
    model, block, activation = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    model.norm = torch.nn.LayerNorm(64, bias=False, dtype=torch.bfloat16)
    block.gate_up, block.activation, model.block = int8_layer(256, 64, is_gate_up=True), activation, block
    activation.__class__, block.gate_up.__class__ = SiluAndMul, LinearBase
    assert sizes(model, torch.bfloat16) == (2 * 64 + 2 * 256 * 64, 2 * 64 + 256 * 64 + 2 * 256)
    passes, packed = {}, {"gate_up": ["gate", "up"]}
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        quant_config=SimpleNamespace(
            activations="int8", fuse_swiglu=True, fuse_norm=False, packed_modules_mapping=packed
        ),
        compilation_config=SimpleNamespace(mode=CompilationMode.VLLM_COMPILE, inductor_compile_config=passes),
        lora_config=None,
        kernel_config=SimpleNamespace(),
    )
    said = "; ".join(summary(model, config))
    assert said == (
        "2 linear layers in INT8, 0.00 -> 0.00 GiB; INT8 activations; SwiGLU fused in 1 layer; "
        "norms not fused: switched off"
    )
    config.lora_config = object()
    assert "SwiGLU not fused: LoRA adds to its inputs" in summary(model, config)
    config.compilation_config.mode = CompilationMode.NONE
    assert "SwiGLU not fused: the model is not compiled" in summary(model, config)
    assert Passes().uuid() == Passes().uuid()
