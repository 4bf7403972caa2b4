"""rowint8.eval.matrix: its commands exist, and it is what made the result files of GPUs."""

import json
import os
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rowint8.eval import matrix
from rowint8.eval.cli.app import app
from rowint8.eval.engines.setups import SETUPS, choose_setups, ladder
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import select_experts, select_shapes
from rowint8.eval.processes import console_script
from rowint8.eval.results.files import read_results


@pytest.mark.parametrize("name", matrix.MEASUREMENTS)
def test_every_measurement_is_a_command_with_these_options(name):
    command = typer.main.get_command(app)
    measured = matrix.MEASUREMENTS[name]
    for piece in measured.pieces or ("",):
        options = [*measured.arguments.split(), *piece.split(), *(["--append"] if piece else [])]
        takes(command, [*options, "--json", "file.json"])


def takes(command, arguments):
    """Whether the command line is one, and its names are known."""
    context = command.make_context("rowint8", arguments)
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, arguments, parent=context)
    assert context.params["json_file"] is not None
    if shapes := context.params.get("shapes"):
        (select_experts if context.params["op"] == "experts" else select_shapes)(shapes)
    if names := context.params.get("setups"):
        choose_setups(names, {**SETUPS, **ladder(gpu=True)})


def test_files_are_named_by_their_gpus():
    names = [matrix.result_file(Path("results"), name, "h200").name for name in ("vllm", "vllm-2", "vllm-qwen3-235b-4")]
    assert names == ["vllm-h200.json", "vllm-h200x2.json", "vllm-qwen3-235b-h200x4.json"]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measurements that a stand-in for `rowint8` makes; returns a function that runs the matrix."""
    script = tmp_path / "rowint8"
    script.write_text(f"#!{sys.executable}\n{RECORDS}")
    script.chmod(0o755)
    commands = {
        "vllm": matrix.Measurement("bench vllm", ("--setups bf16", "--setups fp8"), vllm=""),
        "chain": matrix.Measurement("chain", vllm=""),
        "vllm-2": matrix.Measurement("bench vllm", ("--setups bf16",), gpus=2, vllm=""),
        "old": matrix.Measurement("chain", vllm="0.26"),
    }
    monkeypatch.setattr(matrix, "MEASUREMENTS", commands)
    monkeypatch.setattr(matrix, "card", lambda: "h200")
    monkeypatch.setattr(matrix, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(matrix, "console_script", lambda name: os.fspath(tmp_path / name))

    def run(*arguments):
        (tmp_path / "ran").unlink(missing_ok=True)
        done = CliRunner().invoke(app, ["matrix", "--results", str(tmp_path), *arguments])
        ran = (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []
        return done, sorted(ran)

    return run


RECORDS = """
import os, sys
from pathlib import Path
from rowint8.eval.cli.output import Kept
from rowint8.eval.results.schema import AgreementRow
row = dict(setup="s", dtype="float32", tokens=1, agreed=1, logprob_gap=None, prompt=" ".join(sys.argv[1:-2]))
with (Path(sys.argv[-1]).parent / "ran").open("a") as ran:
    ran.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {row['prompt']}\\n")
with Kept(Path(sys.argv[-1]), AgreementRow, "--append" in sys.argv, lambda row: row.prompt) as kept:
    kept.add([AgreementRow(**row)])
    if (Path(sys.argv[-1]).parent / "break").exists() and "fp8" in sys.argv:
        sys.exit(3)
"""


def test_what_was_cut_is_measured_by_the_next_run_and_nothing_twice(measured, tmp_path):
    (tmp_path / "break").touch()
    done, ran = measured()
    assert str(done.exception) == "failed: vllm"
    bf16, fp8 = (f"bench vllm --setups {name} --append" for name in ("bf16", "fp8"))
    assert sorted(line.partition(" ")[2] for line in ran) == [bf16, bf16, fp8, "chain"]
    assert f"0,1 {bf16}" in ran
    assert not (tmp_path / "old-h200.json").exists(), "it needs another vLLM"
    listed, ran = measured("--list")
    assert ran == []
    assert f"{tmp_path}/vllm-h200.json: 1 commands left\n{tmp_path}/chain-h200.json: done\n" in listed.stdout
    (tmp_path / "break").unlink()
    done, ran = measured()
    assert (done.exit_code, [line.partition(" ")[2] for line in ran]) == (0, ["bench vllm --setups fp8 --append"])
    assert measured()[1] == []


def test_files_of_other_code_are_moved_aside_and_measured_anew(measured, tmp_path):
    measured("chain")
    file = tmp_path / "chain-h200.json"
    content = json.loads(file.read_text())
    content["environment"]["code"] = "0123456789abcdef"
    file.write_text(json.dumps(content))
    assert [line[2:] for line in measured("chain")[1]] == ["chain"]
    assert json.loads((tmp_path / "logs" / "chain.older.json").read_text()) == content
    assert read_results(file).environment.code != "0123456789abcdef"


def test_one_that_fails_or_takes_too_long_does_not_stop_the_next(monkeypatch, tmp_path):
    script = tmp_path / "rowint8"
    sleepy = "import os, sys, time\ntime.sleep(60 * ('slow' in sys.argv))\nos.execv(REAL, sys.argv)\n"
    script.write_text(f"#!{sys.executable}\nREAL = {console_script('rowint8')!r}\n{sleepy}")
    script.chmod(0o755)
    commands = {"bad": "no-such-command", "slow": "demo-model --out slow", "good": "fidelity --help"}
    measurements = {name: matrix.Measurement(arguments, vllm="") for name, arguments in commands.items()}
    monkeypatch.setattr(matrix, "MEASUREMENTS", measurements)
    monkeypatch.setattr(matrix, "visible_gpus", lambda: ["0"])
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
    with pytest.raises(EvalError, match="speed is no measurement; accepted are kernels, kernels-int8, "):
        matrix.matrix(["vllm", "speed"])
