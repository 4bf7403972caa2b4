"""rowint8.eval.matrix: its commands exist, and it is what made the result files of GPUs."""

import os
import sys

import pytest
import typer
from typer.testing import CliRunner

from rowint8.eval import matrix
from rowint8.eval.cli.app import app
from rowint8.eval.errors import EvalError
from rowint8.eval.processes import console_script
from tests.conftest import REPO


@pytest.mark.parametrize("name", matrix.MEASUREMENTS)
def test_every_measurement_is_a_command_with_these_options(name):
    command = typer.main.get_command(app)
    arguments = [*matrix.MEASUREMENTS[name].split(), "--json", "file.json"]
    context = command.make_context("rowint8", arguments)
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, arguments, parent=context)
    assert context.params["json_file"] is not None


def test_every_result_of_a_gpu_has_its_measurement():
    files = {matrix.result_file(REPO / "results", name, "h100").name for name in matrix.MEASUREMENTS}
    found = {file.name for file in REPO.glob("results/*-h100*.json")} - {"demo-h100.json"}
    assert found
    assert found <= files


def test_one_that_fails_or_takes_too_long_does_not_stop_the_next(monkeypatch, tmp_path):
    script = tmp_path / "rowint8"
    sleepy = "import os, sys, time\ntime.sleep(60 * ('slow' in sys.argv))\nos.execv(REAL, sys.argv)\n"
    script.write_text(f"#!{sys.executable}\nREAL = {console_script('rowint8')!r}\n{sleepy}")
    script.chmod(0o755)
    commands = {"bad": "no-such-command", "slow": "demo-model --out slow", "good": "fidelity --help"}
    monkeypatch.setattr(matrix, "MEASUREMENTS", commands)
    monkeypatch.setattr(matrix, "card", lambda: "h100")
    monkeypatch.setattr(matrix, "console_script", lambda name: os.fspath(tmp_path / name))
    done = CliRunner().invoke(app, ["matrix", "--results", str(tmp_path), "--timeout", "15"])
    assert str(done.exception) == "failed: bad, slow"
    assert "bad: failed with exit status 2" in done.stdout
    assert "slow: took too long after 1" in done.stdout
    assert "good: done" in done.stdout
    assert "No such command" in (tmp_path / "logs" / "bad.log").read_text()


@pytest.mark.parametrize("timeout", ["inf", "nan", "0", "1e308"])
def test_a_timeout_that_is_none_is_refused(timeout):
    done = CliRunner().invoke(app, ["matrix", "agreement", "--timeout", timeout])
    assert done.exit_code == 2
    assert "'--timeout'" in done.stderr


def test_unknown_measurements_are_refused():
    with pytest.raises(EvalError, match="speed is no measurement; accepted are kernels, kernels-norm, "):
        matrix.matrix(["vllm", "speed"])
