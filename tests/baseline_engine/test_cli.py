"""`baseline-generate` as its users call it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from rowint8.baseline_engine.extras.command import app

FAST = ["--dtype", "float32", "--device", "cpu"]
COMMAND = [sys.executable, "-c", "from rowint8.baseline_engine.extras.cli import main; main()"]


def call(*args, stdin=""):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def last_json(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_help_has_an_example_and_every_flag():
    result = call("--help")
    assert result.exit_code == 0
    assert "Example: baseline-generate --model" in result.stdout
    flags = (
        "model prompt chat max-tokens temperature top-k top-p min-p repetition-penalty seed stop quantization "
        "fused no-fused int8-lm-head mode dtype device max-seqs max-batch-tokens max-context "
        "cache-tokens memory-fraction json"
    )
    for flag in flags.split():
        assert f"--{flag}" in result.stdout


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['baseline-generate', '--help']\n"
        "from rowint8.baseline_engine.extras.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("extra", [[], ["--quantization", "rowint8"], ["--quantization", "rowint8", "--no-fused"]])
def test_json_contract(smollm2, extra):
    prompts = ["--prompt", "The capital of France is", "--prompt", "Two and two make"]
    result = last_json(call("--model", smollm2, *prompts, "--max-tokens", 6, "--ignore-eos", "--json", *FAST, *extra))
    assert set(result) == {"texts", "token_ids", "finish_reasons", "metrics"}
    assert [len(ids) for ids in result["token_ids"]] == [6, 6]
    assert " Paris" in result["texts"][0]
    assert result["finish_reasons"] == ["length", "length"]
    metrics = result["metrics"]
    assert metrics["output_tokens"] == 12
    assert all(metrics[key] > 0 for key in ("ttft_ms", "itl_ms", "tpot_ms", "tok_s", "wall_s", "load_s"))
    assert metrics["peak_mem_bytes"] > metrics["weight_bytes"] > 100e6
    assert metrics["compile_s"] == 0
    assert [len(request["itl_ms"]) for request in metrics["requests"]] == [5, 5]


def test_fused_without_int8_is_refused(smollm2):
    result = call("--model", smollm2, "--prompt", "a", "--fused")
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("fused SwiGLU is an INT8 operator; give quantization rowint8 with it")


def test_a_stop_text_ends_the_output(smollm2):
    options = ["--prompt", "The capital of France is", "--max-tokens", 20, "--stop", "Paris", "--json"]
    result = last_json(call("--model", smollm2, *options, *FAST))
    assert (result["texts"], result["finish_reasons"]) == ([" "], ["stop"])


def test_seeded_draws_repeat(smollm2):
    options = ["--prompt", "A story:", "--max-tokens", 8, "--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--json"]
    first, again, other = (
        last_json(call("--model", smollm2, *options, "--seed", seed, *FAST))["token_ids"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_text_on_stdout_and_metrics_on_stderr(smollm2):
    result = call("--model", smollm2, "--max-tokens", 5, *FAST, stdin="The capital of France is\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(" Paris")
    assert result.stdout.endswith("\n")
    for name in ("TTFT", "ITL", "TPOT", "tok/s", "peak", "weights"):
        assert name in result.stderr
        assert name not in result.stdout
    assert 'ended by "length"' in result.stderr
    assert "KV" not in result.stderr, "it is in --json"


def test_several_prompts_are_printed_with_their_numbers(smollm2):
    prompts = ["--prompt", "The capital of France is", "--prompt", "The capital of Italy is"]
    result = call("--model", smollm2, *prompts, "--max-tokens", 2, *FAST)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("[1]  Paris")
    assert lines[1].startswith("[2]  Rome")


def test_chat_ends_by_itself(smollm2):
    result = last_json(
        call("--model", smollm2, "--chat", "--prompt", "Say only: yes", "--max-tokens", 60, "--json", *FAST)
    )
    assert result["finish_reasons"] == ["stop"]
    assert result["texts"][0]
    assert "<|im_end|>" not in result["texts"][0]


def test_warmup_runs_the_request_before_it_is_measured(smollm2, monkeypatch):
    from rowint8.baseline_engine.engine import Engine

    calls, plain = [], Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    result = last_json(call("--model", smollm2, "--prompt", "Hi", "--max-tokens", 3, "--warmup", 2, "--json", *FAST))
    assert len(calls) == 3
    assert len(result["token_ids"][0]) == 3


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["--prompt", "a", "--top-p", "0.5"], 2, "set a temperature above 0"),
        (["--prompt", "a", "--max-tokens", "0"], 2, "max_tokens is 0"),
        (["--prompt", "a", "--max-seqs", "0"], 2, "max_seqs is 0"),
        (["--prompt", "a", "--device", "tpu"], 2, "device is 'tpu'"),
        (["--prompt", "a"], 1, "is no folder here; give a folder or a hub name"),
    ],
)
def test_errors_are_one_line(args, code, message):
    result = call("--model", "no/such/model", *args)
    assert result.exit_code == code
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("baseline-generate: error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("args", [[], ["--model", "m", "--quantization", "int4"], ["--model", "m", "--nonsense"]])
def test_bad_usage_exits_2(args):
    result = call(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_an_empty_prompt_is_refused(smollm2):
    result = call("--model", smollm2, *FAST, stdin="")
    assert result.exit_code == 1
    assert "prompt 1 is empty" in result.stderr


def test_interrupting_is_clean(smollm2):
    options = ["--prompt", "Once", "--max-tokens", "4000", "--ignore-eos", *FAST]
    process = subprocess.Popen(
        [*COMMAND, "--model", str(smollm2), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    process.stdout.read(20)  # generation is under way
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert process.returncode == 130
    assert stderr.decode().strip() == "baseline-generate: interrupted"
