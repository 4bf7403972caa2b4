"""rowint8.eval.engines.vllm: rows from timestamps, setups and shapes, failures, and one run in the real engine."""

import io
import json
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rowint8.eval.cli import app as cli
from rowint8.eval.engines import setups as bench_vllm_setups
from rowint8.eval.engines.probe import Compilations, storage_bytes, weight_bytes
from rowint8.eval.engines.setups import SETUPS, Setup, choose_setups, model_folder, write_shape
from rowint8.eval.engines.speed import (
    VLLM_WORKLOADS,
    Workload,
    parse_workloads,
    random_prompts,
    run_setup,
    uniform_requests,
)
from rowint8.eval.engines.speed_worker import generate_with_vllm
from rowint8.eval.engines.vllm import llm_arguments, setup_rows, summary
from rowint8.eval.errors import EvalError
from rowint8.eval.models import MODELS
from rowint8.eval.report.vllm import setup_table, speed_table
from rowint8.eval.results.files import read_results
from rowint8.eval.results.schema import GIB, Generation

TWO_BY_THREE = Workload(2, 5, 3)
REQUESTS = uniform_requests(TWO_BY_THREE, 100)


def repeat(*token_times, start=10.0):
    return {"start": start, "token_times": [list(times) for times in token_times]}


def result(*repeats, weights=(GIB,), peak=(2 * GIB,), compiled=((),)):
    ranks = [
        {"weights": w, "peak_mem": p, "compiled": list(names)}
        for w, p, names in zip(weights, peak, compiled, strict=True)
    ]
    return {"start_s": 60.0, "runs": [{"repeats": list(repeats), "ranks": ranks}]}


ONE_REPEAT = repeat((10.5, 11.0, 12.0), (10.7, 11.0, 12.0))


def drawn(table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def cells(table, *wanted) -> list[str]:
    """The cells of the one line that begins with these."""
    (line,) = [line.split() for line in drawn(table).splitlines() if line.split()[: len(wanted)] == list(wanted)]
    return line[len(wanted) :]


def test_metrics_by_hand():
    (row,) = setup_rows("rowint8", [REQUESTS], result(ONE_REPEAT))
    assert row.ttft_ms == pytest.approx((500 + 700) / 2)
    assert row.itl_ms == pytest.approx(750), "the median of 500, 1000, 300 and 1000"
    assert row.tpot_ms == pytest.approx((1500 / 2 + 1300 / 2) / 2)
    assert row.tok_s == pytest.approx(6 / 2), "six tokens in the two seconds from the start to the last"
    assert (row.weights_gib, row.peak_mem_gib, row.start_s) == (1, 2, 60)
    assert (row.batch, row.prompt_tokens, row.output_tokens, row.repeats) == (2, 5, 3, 1)
    assert set(row.spread.values()) == {0}


def test_medians_and_spread_over_repeats():
    repeats = [repeat((start + 1, start + 1 + gap), start=start) for start, gap in ((10, 1), (20, 2), (30, 4))]
    (row,) = setup_rows("bf16", [uniform_requests(Workload(1, 5, 2), 100)], result(*repeats))
    assert (row.ttft_ms, row.itl_ms, row.tpot_ms) == pytest.approx((1000, 2000, 2000))
    assert row.tok_s == pytest.approx(2 / 3)
    assert row.spread == pytest.approx(
        {"ttft_ms": 0, "itl_ms": 1.5, "tpot_ms": 1.5, "tok_s": (2 / 2 - 2 / 5) / (2 / 3)}
    )
    assert row.repeats == 3


def test_a_single_output_token_has_no_gaps():
    (row,) = setup_rows("bf16", [uniform_requests(Workload(2, 5, 1), 100)], result(repeat((10.5,), (11.0,))))
    assert (row.itl_ms, row.tpot_ms, set(row.spread)) == (None, None, {"ttft_ms", "tok_s"})
    assert row.tok_s == pytest.approx(2)
    assert cells(speed_table([row]), "2x5x1", "bf16")[0] == "750.0"


def test_the_fullest_rank_counts_and_all_of_them_compile():
    (row,) = setup_rows(
        "rowint8",
        [REQUESTS],
        result(ONE_REPEAT, weights=(GIB, 3 * GIB), peak=(5 * GIB, 4 * GIB), compiled=(["a"], ["a", "b"])),
    )
    assert (row.weights_gib, row.peak_mem_gib, row.tensor_parallel_size) == (3, 5, 2)
    assert row.compiled == ("a", "a", "b")
    assert summary([row], 90).endswith("90 s, of which engine start 60; compiled while answering: 2 x a, 1 x b")
    assert cells(setup_table([row, row]), "rowint8") == ["2", "3.000", "60.0", "6"]


def test_missing_tokens_are_an_error():
    with pytest.raises(EvalError, match="request 2: the engine returned 2 tokens, 3 were asked for"):
        setup_rows("bf16", [REQUESTS], result(repeat((1, 2, 3), (1, 2))))


def test_ratio_is_to_bf16_on_the_same_workload():
    (bf16,) = setup_rows("bf16", [REQUESTS], result(ONE_REPEAT))
    faster = replace(bf16, setup="rowint8", tok_s=bf16.tok_s * 1.7)
    other = replace(faster, batch=8)
    table = speed_table([bf16, other, faster])
    assert cells(table, "2x5x3", "bf16")[-2] == "1.00"
    assert cells(table, "2x5x3", "rowint8")[-2] == "1.70"
    assert cells(table, "8x5x3", "rowint8")[-2:] == ["0.0%", "2.00"], "no bf16 to compare with"


def test_rows_have_the_keys_of_every_generation():
    (row,) = setup_rows("bf16", [REQUESTS], result(ONE_REPEAT))
    assert isinstance(row, Generation)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        replace(row, spread={"tok_s": -0.1})


def test_workloads():
    assert parse_workloads("1x128x128,8x1024x1") == [Workload(1, 128, 128), Workload(8, 1024, 1)]
    assert [str(workload) for workload in parse_workloads(VLLM_WORKLOADS)] == VLLM_WORKLOADS.split(",")


@pytest.mark.parametrize("text", ["", "8", "1x128", "1x2x3x4", "0x1x1", "1x-2x3", "1xax3", "1x2x3,"])
def test_wrong_workloads_are_refused(text):
    with pytest.raises(EvalError, match="--workloads is"):
        parse_workloads(text)


def test_arguments_fit_the_workloads(tmp_path):
    arguments = llm_arguments(tmp_path, parse_workloads(VLLM_WORKLOADS), 2, eager=False)
    assert arguments["compilation_config"] == {"cudagraph_capture_sizes": [1, 8, 32, 128, 256]}
    assert (arguments["max_num_seqs"], arguments["max_model_len"], arguments["tensor_parallel_size"]) == (256, 3001, 2)
    assert not arguments["enable_expert_parallel"]
    assert llm_arguments(tmp_path, [TWO_BY_THREE], 4, False, expert_parallel=True)["enable_expert_parallel"]
    assert "compilation_config" not in llm_arguments(tmp_path, [Workload(8, 16, 1)], 1, eager=False)
    assert "compilation_config" not in llm_arguments(tmp_path, [TWO_BY_THREE], 1, eager=True)


def test_setups_are_chosen_by_name():
    assert choose_setups(None) == list(SETUPS)
    assert choose_setups("fp8,bf16") == ["fp8", "bf16"]
    with pytest.raises(EvalError, match="has int3; accepted are bf16, rowint8"):
        choose_setups("bf16,int3")
    with pytest.raises(EvalError, match="twice"):
        choose_setups("bf16,bf16")


def test_help_names_every_setup_workload_and_shape(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    shown = CliRunner().invoke(cli.app, ["bench", "vllm", "--help"]).stdout
    assert ", ".join(SETUPS) in shown
    assert VLLM_WORKLOADS in shown
    assert ", ".join(MODELS) in shown
    assert "Example: rowint8 bench vllm" in shown


def test_options_of_the_rowint8_setups_are_those_of_the_plugin():
    pytest.importorskip("vllm")
    from rowint8.vllm_plugin.config import RowInt8Config

    configs = {
        name: RowInt8Config.from_config(SETUPS[name].arguments["hf_overrides"]["quantization_config"])
        for name in ("rowint8-unfused", "rowint8-lm-head", "rowint8-a8")
    }
    assert not configs["rowint8-unfused"].fuse_swiglu
    assert configs["rowint8-lm-head"].lm_head
    assert configs["rowint8-a8"].activations == "int8"
    assert not any(config.serialized for config in configs.values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_shapes_are_those_of_the_published_models(tmp_path, name, parameters):
    from transformers import AutoConfig, AutoModelForCausalLM

    write_shape(name, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_depth_can_be_cut(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"]}))
    with model_folder(None, str(own), 3) as (folder, loading):
        written = json.loads((folder / "config.json").read_text())
        assert loading == {"load_format": "dummy"}
    assert written == {"num_hidden_layers": 3, "layer_types": ["a", "b", "a"]}
    assert not folder.exists()


@pytest.mark.parametrize(
    ("model", "config", "layers", "message"),
    [
        (None, "llama-9", None, "--config is llama-9; accepted are llama-3.1-8b"),
        ("nowhere", None, None, "nowhere is not a model folder"),
        ("nowhere", "tiny", None, "--config and --layers are of dummy weights"),
        ("nowhere", None, 2, "--config and --layers are of dummy weights"),
    ],
)
def test_wrong_models_are_refused(tmp_path, model, config, layers, message):
    with pytest.raises(EvalError, match=message), model_folder(model and tmp_path / model, config, layers):
        pass


def test_weights_count_shared_memory_once_and_no_tables():
    model = torch.nn.Linear(4, 8, bias=False)
    model.tied = torch.nn.Linear(4, 8, bias=False)
    model.tied.weight = model.weight
    model.register_buffer("scale", torch.ones(8))
    model.register_buffer("table", torch.ones(1000), persistent=False)
    assert weight_bytes(model) == 4 * 8 * 4 + 8 * 4
    whole = torch.empty(100, dtype=torch.int8)
    assert storage_bytes([whole[:10], whole[50:], None]) == 100


def test_compilations_are_noticed(tmp_path, monkeypatch):
    """A kernel compiled, and again from the disk cache; a graph traced by torch.compile."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    def nothing(x):
        pass

    heard = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: heard.append(event["cache_hit"]))
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    compilations = Compilations()
    assert compilations.read() == []
    source = ASTSource(JITFunction(nothing), {"x": "*fp32"}, {})
    for _ in range(2):
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert compilations.read() == ["nothing", "nothing", "torch.compile graph"]
    assert heard == [False, True], "a listener that was there already still hears"
    assert compilations.read() == []


class FakeEngine:
    """Gives every unfinished request one token a step, the second request only from the second step on."""

    def __init__(self):
        self.left = {}
        self.steps = 0

    def add_request(self, name, prompt, sampling):
        assert (sampling.ignore_eos, sampling.temperature, prompt["type"]) == (True, 0, "token")
        self.left[name] = sampling.max_tokens

    def has_unfinished_requests(self):
        return any(self.left.values())

    def step(self):
        from types import SimpleNamespace as Namespace

        self.steps += 1
        time.sleep(0.01)
        answered = [name for name, left in self.left.items() if left and (name == "0" or self.steps > 1)]
        for name in answered:
            self.left[name] -= 1
        return [Namespace(request_id=name, outputs=[Namespace(token_ids=[7])]) for name in answered]


def test_each_token_gets_the_time_of_its_step():
    pytest.importorskip("vllm")
    engine = FakeEngine()
    before = time.perf_counter()
    run = generate_with_vllm(engine, random_prompts(2, 5, 100), [3, 3])
    first, second = run["token_times"]
    assert (len(first), len(second), engine.steps) == (3, 3, 4)
    assert before <= run["start"] <= first[0] - 0.01
    assert second == [*first[1:], second[-1]]
    assert second[-1] >= first[-1] + 0.01


def test_prompts_are_the_same_for_every_setup():
    assert random_prompts(2, 5, 100) == random_prompts(2, 5, 100)
    first, second = random_prompts(2, 50, 100)
    assert first != second
    assert {len(first), len(second)} == {50}
    assert set(first + second) <= set(range(100))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Lets a shell script stand in for the worker: $4 is its request, $5 its result."""

    def install(body: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return install


def test_the_worker_gets_the_setup(stand_in, tmp_path):
    stand_in(f"cp $4 {tmp_path}/request; env > {tmp_path}/env; echo '{{}}' > $5")
    setup = Setup({"quantization": "fp8", "load_format": "auto"}, {"ROWINT8_TEST": "there"})
    assert run_setup(setup, {"model": "m", "load_format": "dummy"}, [REQUESTS], 4) == {}
    request = json.loads((tmp_path / "request").read_text())
    llm = {"model": "m", "load_format": "auto", "quantization": "fp8"}
    runs = {"prompts": REQUESTS.prompts, "outputs": [3, 3], "unmeasured": 1, "repeats": 4}
    assert request == {"engine": "vllm", "arguments": llm, "dummy": True, "workloads": [runs]}
    env = (tmp_path / "env").read_text().splitlines()
    assert {"ROWINT8_TEST=there", "VLLM_CPU_NUM_OF_RESERVED_CPU=0", "VLLM_NO_USAGE_STATS=1"} <= set(env)
    assert "VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random" in env


def test_a_result_counts_even_if_vllm_fails_to_stop(stand_in):
    stand_in("echo '{\"start_s\": 1}' > $5; exit 134")
    assert run_setup(SETUPS["bf16"], {}, [REQUESTS], 1) == {"start_s": 1}


def test_the_first_error_is_no_warning(stand_in):
    stand_in(
        "echo 'WARNING is a word'; echo 'x WARNING ValueError: harmless'; echo 'KeyError: cause'; echo end; exit 3"
    )
    with pytest.raises(EvalError, match=r"(?s)exit status 3; first error: KeyError: cause\n.*WARNING is a word.*end"):
        run_setup(SETUPS["bf16"], {}, [REQUESTS], 1)


def test_a_setup_that_hangs_is_ended_with_its_children(stand_in, tmp_path):
    stand_in(f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(EvalError, match="did not answer in time"):
        run_setup(SETUPS["bf16"], {}, [REQUESTS], 1, timeout=1.0)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child is still there"
        time.sleep(0.05)


def test_setups_that_cannot_run_are_said(monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setitem(bench_vllm_setups.SETUPS, "other", Setup({}, package="no_such_package"))
    monkeypatch.setattr(bench_vllm_setups, "vllm_methods", lambda: ["fp8"])
    monkeypatch.setattr(bench_vllm_setups, "version", lambda name: "0.26.0")
    done = CliRunner().invoke(cli.app, ["bench", "vllm", "--setups", "other,fp8_per_channel"])
    assert "no setup of --setups can run here" in str(done.exception)
    assert "without other: the package no_such_package is not installed\n" in done.stderr
    assert "without fp8_per_channel: vLLM 0.26.0 has no --quantization fp8_per_channel\n" in done.stderr
    assert [SETUPS[name].lacks() for name in ("bf16", "rowint8", "rowint8-a8", "fp8", "w8a8")] == [None] * 5


def test_vllm_takes_the_w8a8_of_compressed_tensors():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = SETUPS["w8a8"].arguments["hf_overrides"]["quantization_config"]
    (scheme,) = CompressedTensorsConfig.from_config(config).target_scheme_map.values()
    assert (scheme["weights"].strategy, scheme["input_activations"].strategy) == ("channel", "token")
    assert scheme["input_activations"].dynamic


@pytest.mark.parametrize(("name", "layers"), [("qwen3-235b-a22b", 10_000), ("mixtral-8x7b", 20_000)])
def test_experts_count_among_what_no_memory_holds(name, layers):
    with pytest.raises(EvalError, match=r"the weights take [0-9,]+ GiB or more"), model_folder(None, name, layers):
        pass


@pytest.mark.vllm
def test_a_real_run_keeps_the_rows_of_the_setups_that_work(tmp_path, monkeypatch):
    """bf16 and rowint8 through the real engine, with one between them that vLLM refuses."""
    pytest.importorskip("vllm")
    unknown = Setup({"hf_overrides": {"quantization_config": {"quant_method": "no-such-method"}}})
    monkeypatch.setitem(bench_vllm_setups.SETUPS, "broken", unknown)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = [
        "--config",
        "tiny",
        "--enforce-eager",
        "--setups",
        "bf16,broken,rowint8",
        "--workloads",
        "2x8x4,3x64x1",
    ]
    done = CliRunner().invoke(
        cli.app,
        ["bench", "vllm", *options, "--repeats", "2", "--json", str(tmp_path / "r.json")],
        catch_exceptions=True,
    )
    assert str(done.exception).startswith("failed: broken")
    assert "no-such-method" in done.stderr
    rows = read_results(tmp_path / "r.json").rows
    assert [(row.setup, row.batch, row.prompt_tokens, row.output_tokens) for row in rows] == [
        (setup, *size) for setup in ("bf16", "rowint8") for size in ((2, 8, 4), (3, 64, 1))
    ]
    sizes = {row.setup: row.weights_gib * GIB for row in rows}
    # Where its CPU build has packed unquantized linear weights for AVX-512, vLLM drops them.
    dense = [pytest.approx(tiny_weights(linear_bytes, row_bytes=0), abs=100) for linear_bytes in (2, 0)]
    assert sizes["bf16"] in dense
    assert sizes["rowint8"] == pytest.approx(tiny_weights(linear_bytes=1, row_bytes=2), abs=100)
    assert all(row.compiled == () and row.repeats == 2 for row in rows)
    assert "2x8x4" in done.stdout


def tiny_weights(linear_bytes: int, row_bytes: int) -> int:
    """Bytes of the shape "tiny" in bf16, with other sizes for a linear layer's weights and for each of its rows."""
    shape = MODELS["tiny"]
    hidden, intermediate, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    matrices = [(3 * hidden, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)]
    layer = sum(n * k * linear_bytes + n * row_bytes for n, k in matrices) + 2 * hidden * 2
    return layers * layer + hidden * 2 + 2 * shape["vocab_size"] * hidden * 2
