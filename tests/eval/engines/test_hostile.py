"""What nobody should give the commands that time engines is refused at once: no traceback, no hang, no allocation."""

import json
import os

import pytest
from typer.testing import CliRunner

from rowint8.baseline_engine.errors import EngineError
from rowint8.eval.cli.app import app
from rowint8.eval.engines import profile, serve, speed
from rowint8.eval.errors import EvalError
from rowint8.eval.models import MODELS

COMMANDS = (
    ("bench", "engine", "--setups", "int8"),
    ("bench", "vllm", "--setups", "rowint8"),
    ("bench", "serve", "--setups", "rowint8"),
    ("profile", "--setups", "int8"),
)
NO_CONFIGS = {
    "list": "[1, 2]",
    "string": '"x"',
    "null": "null",
    "number": "3",
    "NaN": "NaN",
    "nothing": "",
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": json.dumps(MODELS["tiny"]).encode("utf-16"),
    "too many digits": '{"vocab_size": ' + "9" * 5000 + "}",
}
NO_SIZES = ("512", None, -5, 0, 512.5, True, [1], {}, 10**12)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """An engine that is started is a failure."""

    def start(*_, **__):
        raise AssertionError("an engine is started")

    monkeypatch.setattr(speed, "run_worker", start)
    monkeypatch.setattr(profile, "run_worker", start)
    monkeypatch.setattr(serve, "vllm_server", start)
    monkeypatch.setattr("psutil.cpu_percent", lambda *_: 0.0)


def refused(*arguments) -> str:
    """The message with which the command refuses the arguments."""
    if arguments[1] == "vllm":
        pytest.importorskip("vllm")
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, SystemExit):
        assert done.exit_code == 2
        return " ".join(done.stderr.replace("│", " ").split())
    assert isinstance(done.exception, (EvalError, EngineError, OSError)), done.exception
    return str(done.exception)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_a_config_that_is_none_is_refused(tmp_path, command, content):
    file = tmp_path / "own.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(*command, "--config", str(file))
    assert message.startswith(str(file))
    assert "\n" not in message


@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_that_is_no_file_is_refused(tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    for name in ("pipe", "folder"):
        assert "is no regular file" in refused(*command, "--config", str(tmp_path / name))
    for name in ("missing", "~nouser/x", "[red]x[/]", "[/nope]", "\udcff"):
        assert f"--config is {name}; accepted are llama-3.1-8b" in refused(*command, "--config", name)
    assert "File name too long" in refused(*command, "--config", "n" * 300)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_sizes_that_are_none_are_refused(tmp_path, command, key, size):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({**MODELS["tiny"], key: size}))
    assert f"{file}: {key} is {size!r}; accepted are whole numbers" in refused(*command, "--config", str(file))


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_no_memory_holds_are_refused_before_they_are_made(tmp_path, command):
    for layers in ("1000000", "16777216"):
        assert "give fewer --layers" in refused(*command, "--config", "llama-3.1-8b", "--layers", layers)
    file = tmp_path / "own.json"
    file.write_text(json.dumps({**MODELS["tiny"], "hidden_size": 2**24, "intermediate_size": 2**24}))
    assert "the weights take" in refused(*command, "--config", str(file))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_without_a_vocabulary_is_refused(tmp_path, command):
    file = tmp_path / "own.json"
    for config in ({}, {"text_config": None}, {"text_config": [1]}, {"text_config": {}}):
        file.write_text(json.dumps(config))
        assert "has no vocab_size" in refused(*command, "--config", str(file))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["~nouser/x", "[red]x[/]", "[/nope]", "\udcff", ".", "/dev/null", ""])
def test_a_model_that_is_none_is_refused(command, name):
    assert "is not a model folder" in refused(*command, "--model", name)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["[red]x[/]", "[/nope]", "\udcff", ",", "int8,,"])
def test_setups_that_are_none_are_refused(command, name):
    command = [part for part in command if part not in ("--setups", "int8", "rowint8")]
    assert "--setups has " in refused(*command, "--config", "tiny", "--setups", name)


HUGE = ("1000000000", "1000000000000000", "9" * 5000, "-1", "nan", "1e9")
NUMBERS = {
    "engine": ("--sequences", "--repeats", "--layers"),
    "vllm": ("--repeats", "--layers", "--tensor-parallel-size"),
    "serve": ("--prompt-tokens", "--output-tokens", "--layers", "--tensor-parallel-size"),
    "profile": ("--prompt-tokens", "--steps", "--layers"),
}


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in COMMANDS for option in NUMBERS[command[command[0] == "bench"]]],
)
@pytest.mark.parametrize("number", HUGE)
def test_numbers_beyond_all_measure_are_refused(command, option, number):
    assert option in refused(*command, "--config", "tiny", option, number)


@pytest.mark.parametrize("seconds", ["inf", "nan", "-inf", "1e308", "-1", "86401"])
def test_a_load_that_never_ends_is_refused(seconds):
    assert "--seconds" in refused(*COMMANDS[2], "--config", "tiny", "--seconds", seconds)


@pytest.mark.parametrize("rate", ["1e308", "1e-300", "1e400", "9" * 5000, "nan", "4,inf", "100000"])
def test_rates_beyond_all_measure_are_refused(rate):
    assert "--rates is " in refused(*COMMANDS[2], "--config", "tiny", "--rates", rate)


@pytest.mark.parametrize(
    "workload", ["999999999x1x1", "65537x1x1", "1x999999999x1", "1x1x999999999", "9999x9999x1", "9" * 5000]
)
@pytest.mark.parametrize("command", COMMANDS[:2])
def test_workloads_beyond_all_measure_are_refused(command, workload):
    assert "--workloads " in refused(*command, "--config", "tiny", "--workloads", workload)


@pytest.mark.parametrize("batches", ["999999999", "65537", "1,16777216", "9" * 5000, "1,,2"])
def test_batches_beyond_all_measure_are_refused(batches):
    assert "--batches " in refused(*COMMANDS[3], "--config", "tiny", "--batches", batches)
