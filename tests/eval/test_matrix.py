"""scripts/measure.py: its commands exist, and it is what made the result files of GPUs."""

import sys

import pytest
import typer

from rowint8.eval import matrix as measure
from rowint8.eval.cli.app import app
from tests.conftest import REPO


@pytest.mark.parametrize("name", measure.MEASUREMENTS)
def test_every_measurement_is_a_command_with_these_options(name):
    command = typer.main.get_command(app)
    arguments = [*measure.MEASUREMENTS[name].split(), "--json", "file.json"]
    context = command.make_context("rowint8", arguments)
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, arguments, parent=context)
    assert context.params["json_file"] is not None


def test_every_result_of_a_gpu_has_its_measurement():
    files = {measure.result_file(REPO / "results", name, "h100").name for name in measure.MEASUREMENTS}
    found = {file.name for file in REPO.glob("results/*-h100*.json")} - {"demo-h100.json"}
    assert found
    assert found <= files


def test_one_that_fails_or_takes_too_long_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    commands = {"bad": "no-such-command", "slow": "demo-model --out slow", "good": "fidelity --help"}
    monkeypatch.setattr(measure, "MEASUREMENTS", commands)
    monkeypatch.setattr(measure, "card", lambda: "h100")
    monkeypatch.setattr(measure, "START", "import sys, time; time.sleep(60 * ('slow' in sys.argv)); " + measure.START)
    monkeypatch.setattr(sys, "argv", ["measure", "--results", str(tmp_path), "--timeout", "15"])
    with pytest.raises(SystemExit, match="failed: bad, slow"):
        measure.main()
    said = capsys.readouterr().out
    assert "bad: failed with exit status 2" in said
    assert "slow: took too long after 1" in said
    assert "good: done" in said
    assert "No such command" in (tmp_path / "logs" / "bad.log").read_text()
