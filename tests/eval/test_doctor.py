"""`rowint8 doctor`: what it says of cards, plugins and models, and that its numbers are those of results/."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rowint8.eval import doctor
from rowint8.eval.cli import app
from rowint8.eval.errors import EvalError
from rowint8.eval.models import MODELS, weight_bytes
from rowint8.eval.quantize.sizes import FORMS, read_sizes
from rowint8.eval.report.checks import read_ceilings
from rowint8.eval.results.files import read_results
from rowint8.kernels.tiles.card import card_of
from tests.conftest import REPO
from tests.eval.cli.test_app import rowint8

GIB = 2**30
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(vocab_size=128, head_dim=16)
SETUPS = {"bf16": "bf16", "rowint8": "rowint8", "rowint8-lm-head": "rowint8 + lm_head"}


def sizes_of(folder: Path, **config):
    (folder / "config.json").write_text(json.dumps({**SMALL, **config}))
    return read_sizes(str(folder))


@pytest.fixture
def cards(monkeypatch):
    """Makes torch see cards, each (name, capability, GiB)."""

    def see(*found):
        properties = [
            SimpleNamespace(
                name=name,
                major=capability[0],
                minor=capability[1],
                total_memory=gib * GIB,
                shared_memory_per_block_optin=101_376,
                multi_processor_count=132,
            )
            for name, capability, gib in found
        ]

        def at(device):
            return properties[getattr(device, "index", device)]

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
        monkeypatch.setattr(torch.cuda, "get_device_properties", at)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (at(device).major, at(device).minor))

    card_of.cache_clear()
    yield see
    card_of.cache_clear()


H200, A100 = ("NVIDIA H200", (9, 0), 141), ("NVIDIA A100-SXM4-80GB", (8, 0), 80)


def test_ceilings_are_the_highest_of_the_result_files():
    found = {path.stem: read_results(path) for path in (REPO / "results").glob("kernels*.json")}
    measured = {card: round(rate, 2) for card, rate in read_ceilings(found).items()}
    assert "NVIDIA H200" in measured
    assert doctor.CEILINGS | measured == doctor.CEILINGS


def test_estimates_meet_what_vllm_was_measured_at():
    estimates = {(each.card, each.form): each for each in doctor.estimates(read_sizes("llama-3.1-8b"), [])}
    compared = 0
    for path in (REPO / "results").glob("vllm-*h200.json"):
        measured = read_results(path)
        if "--config" in measured.command:  # another model
            continue
        for row in measured.rows:
            if row.setup in SETUPS and (row.batch, row.prompt_tokens) == (1, 128):
                estimate = estimates[measured.environment.device, SETUPS[row.setup]]
                assert estimate.about == pytest.approx(1000 / row.itl_ms, rel=0.1)
                assert estimate.at_most > 1000 / row.itl_ms
                compared += 1
    assert compared >= 4


@pytest.mark.parametrize(
    ("card", "tb_s", "gib", "users", "context"),
    [("A100 80 GB", 2.039, 79.3, 64, 1000), ("RTX 4090", 1.008, 24.0, 1, 0)],
)
def test_the_readmes_estimates_follow_the_doctors_rule(card, tb_s, gib, users, context):
    """Rates are the data sheets', of which an H200 reaches the share that is taken here (its own is 4.8)."""
    sizes, kv_bytes = read_sizes("llama-3.1-8b"), 2 * 32 * 8 * 128 * 2
    rate = tb_s * 1e12 * doctor.CEILINGS["NVIDIA H200"] / 4.8
    besides = sizes.decoder_layers * doctor.LAYER_US / 1e6
    steps = [(sizes.read[form] + users * context * kv_bytes) / rate + besides for form in ("bf16", "rowint8")]
    room = (0.9 * gib * GIB - sizes.weights["rowint8"] - GIB) / kv_bytes / users
    [line] = [line for line in (REPO / "README.md").read_text().splitlines() if line.startswith(f"| {card}")]
    told = [float(cell.replace(",", "").split()[0]) for cell in line.strip("|").split("|")[1:]]
    assert told == pytest.approx([users / steps[0], users / steps[1], room], rel=0.02)


def test_a_models_bytes_are_those_of_the_arithmetic_on_its_shape():
    sizes, config = read_sizes("llama-3.1-8b"), MODELS["llama-3.1-8b"]
    expected = [weight_bytes(config, "bf16"), weight_bytes(config, "rowint8"), weight_bytes(config, "rowint8", True)]
    assert list(sizes.weights.values()) == expected
    embedding = 2 * config["vocab_size"] * config["hidden_size"]
    assert sizes.read == {form: size - embedding for form, size in sizes.weights.items()}
    assert (sizes.linear_layers, sizes.decoder_layers, sizes.has_experts) == (224, 32, False)


def test_a_tied_head_is_read_and_counts_once(tmp_path):
    sizes = sizes_of(tmp_path, model_type="llama", tie_word_embeddings=True)
    assert sizes.read == sizes.weights
    assert sizes.weights["rowint8"] - sizes.weights["rowint8 + lm_head"] == 128 * 64 - 2 * 128


def test_of_experts_the_chosen_ones_are_read(tmp_path):
    sizes = sizes_of(tmp_path, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    experts = 3 * 4 * (2 * 128 * 64 + 64 * 128)
    assert sizes.has_experts
    assert sizes.weights["bf16"] - sizes.read["bf16"] == 2 * experts // 2 + 2 * 128 * 64, "half of them, the embedding"
    assert sizes.weights["bf16"] - sizes.weights["rowint8"] > experts, "a byte for each of their numbers, and others"


def test_experts_with_biases_stay_as_they_are(tmp_path):
    plain, small = (
        sizes_of(tmp_path, model_type=kind, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)
        for kind in ("gpt_oss", "mixtral")
    )
    saved = [sizes.weights["bf16"] - sizes.weights["rowint8"] for sizes in (plain, small)]
    assert 0 < saved[0] < saved[1] / 2


def test_a_config_of_too_many_layers_is_refused_at_once(tmp_path):
    with pytest.raises(EvalError, match="num_hidden_layers is 100000; accepted are whole numbers to 1000"):
        sizes_of(tmp_path, model_type="llama", num_hidden_layers=100_000)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "older than Ampere"),
        ((8, 0), "Ampere"),
        ((8, 6), "Ampere"),
        ((8, 9), "Ada"),
        ((9, 0), "Hopper"),
        ((10, 3), "Blackwell"),
        ((12, 0), "Blackwell"),
        ((13, 0), "newer than Blackwell"),
    ],
)
def test_a_generation_is_known_by_its_capability(capability, name):
    assert doctor.generation(capability) == name


def test_each_kind_of_card_is_listed_once_with_its_kernels(cards):
    cards(H200, A100, H200, ("Tesla T4", (7, 5), 16))
    hopper, ampere, old = doctor.gpus()
    assert [(gpu.name, gpu.count) for gpu in (hopper, ampere, old)] == [
        ("NVIDIA H200", 2),
        ("NVIDIA A100-SXM4-80GB", 1),
        ("Tesla T4", 1),
    ]
    assert hopper.kernels == {"1": "Triton", "2 to 8": "Gluon, few tokens", "9 and more": "Gluon, Hopper (TMA, wgmma)"}
    assert ampere.kernels == {"1": "Triton", "2 to 8": "Gluon, few tokens", "9 and more": "Triton"}
    assert old.kernels == {}
    assert hopper.no_int8_activations is None
    cards(("NVIDIA B300", (10, 3), 288))
    [slow] = doctor.gpus()
    assert "slow in INT8" in str(slow.no_int8_activations)


def test_estimates_are_of_the_card_that_is_there_if_it_was_measured(cards):
    sizes = read_sizes("llama-3.1-8b")
    cards(H200)
    assert {each.card for each in doctor.estimates(sizes, doctor.gpus())} == {"NVIDIA H200"}
    cards(A100)
    assert {each.card for each in doctor.estimates(sizes, doctor.gpus())} == doctor.CEILINGS.keys()
    assert {each.form for each in doctor.estimates(sizes, [])} == FORMS.keys()


def test_advice_names_the_better_method(cards, tmp_path):
    cards(H200)
    said = doctor.advice(read_sizes("llama-3.1-70b"), doctor.gpus())
    assert [line.split(":")[0] for line in said] == [
        "Mostly 128 requests at once or more, or long prompts, on a card with FP8 units"
    ]
    cards(("NVIDIA A100-SXM4-40GB", (8, 0), 40))
    said = doctor.advice(read_sizes("llama-3.1-70b"), doctor.gpus())
    assert said[0].endswith("INT8 weights gain no time.")
    assert said[1] == "One card is too small: --tensor-parallel-size 2 or more, or a method of four bits."
    small = sizes_of(tmp_path, model_type="llama", vocab_size=8000, quantization_config={"quant_method": "awq"})
    said = "\n".join(doctor.advice(small, doctor.gpus()))
    assert "quantized already (awq)" in said
    assert "Narrow layers: bf16 is faster" in said
    assert "of the bytes, as most are no linear layers" in said


def test_a_missing_plugin_has_a_reason(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor, "run_worker", lambda *_: ["fp8"])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert "does not find the plugin" in str(doctor.plugin_problem())
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS is 'other' and does not name rowint8" in str(doctor.plugin_problem())

    def fails(*_):
        raise EvalError("`python` failed; first error: ImportError: no libcudart\nthe end of its log")

    monkeypatch.setattr(doctor, "run_worker", fails)
    assert str(doctor.plugin_problem()).endswith("ImportError: no libcudart")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.plugin_problem() == "vLLM is not installed; run `pip install 'rowint8[vllm]'`"


def test_cards_are_described_in_80_columns(cards, monkeypatch, capsys, tmp_path):
    cards(H200, H200, ("Tesla T4", (7, 5), 16))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "plugin_problem", lambda: "VLLM_PLUGINS is 'other' and does not name rowint8")
    monkeypatch.setattr("sys.argv", ["rowint8", "doctor", "llama-3.1-8b", "--json", str(tmp_path / "doctor.json")])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    said = capsys.readouterr().out
    assert not stopped.value.code
    assert max(map(len, said.splitlines())) <= 80
    for part in ("2 x NVIDIA H200: Hopper", "the kernels need Ampere", "does not name rowint8", "8.46", "Estimates"):
        assert part in said
    facts = json.loads((tmp_path / "doctor.json").read_text())
    assert facts["gpus"][0]["capability"] == [9, 0]
    assert facts["estimates"][1]["form"] == "rowint8"
    assert facts["model"]["weights"]["rowint8"] == weight_bytes(MODELS["llama-3.1-8b"], "rowint8")


@pytest.mark.vllm
def test_vllm_itself_says_whether_it_sees_the_plugin(tmp_path):
    done = rowint8("doctor", "--json", str(tmp_path / "doctor.json"))
    assert done.returncode == 0, done.stderr
    assert "vLLM knows --quantization rowint8" in done.stdout
    facts = json.loads((tmp_path / "doctor.json").read_text())
    assert facts["plugin_problem"] is None
    assert facts["environment"]["vllm"]
    assert "model" not in facts
