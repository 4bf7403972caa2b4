"""rowint8.eval.demo: the table and rows from what `baseline-generate --json` reports."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rowint8.eval import demo
from rowint8.eval.demo import SETUPS, SetupRun, generation_table, row_of, run_setup, run_setups, texts_by_setup
from rowint8.eval.errors import EvalError

REPORT = {
    "texts": ["Blue."],
    "token_ids": [[1, 2, 3]],
    "metrics": {
        "ttft_ms": 100.0,
        "itl_ms": 20.0,
        "tpot_ms": 25.0,
        "tok_s": 20.0,
        "weight_bytes": 269_030_016,
        "peak_mem_bytes": 512 * 2**20,
        "requests": [{"prompt_tokens": 41, "output_tokens": 3}],
    },
}


def drawn(table, width=80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def report(**metrics) -> dict:
    return {**REPORT, "metrics": {**REPORT["metrics"], **metrics}}


def test_row_of_a_report():
    row = row_of("int8", REPORT, "baseline-generate ...")
    assert (row.prompt_tokens, row.output_tokens, row.batch, row.engine) == (41, 3, 1, "baseline")
    assert (row.ttft_ms, row.itl_ms, row.tpot_ms, row.tok_s) == (100.0, 20.0, 25.0, 20.0)
    assert row.weights_gib * 2**30 == 269_030_016
    assert row.peak_mem_gib == 0.5


def test_table_shows_every_column_in_80_characters():
    rows = [row_of("bf16-eager", REPORT, "c"), row_of("int8-fused-compile", report(tok_s=50.0), "c")]
    lines = drawn(generation_table(rows)).splitlines()
    (first,) = [line.split() for line in lines if line.startswith(" bf16-eager ")]
    (second,) = [line.split() for line in lines if line.startswith(" int8-fused-compile ")]
    assert first == ["bf16-eager", "100.0", "20.0", "25.0", "20.0", "512", "257", "1.00x"]
    assert second[-1] == "2.50x"


def test_table_of_a_single_token_has_no_gaps():
    single = report(itl_ms=None, tpot_ms=None, requests=[{"prompt_tokens": 41, "output_tokens": 1}])
    (line,) = [line for line in drawn(generation_table([row_of("one", single, "c")])).splitlines() if " one " in line]
    assert line.split()[1:4] == ["100.0", "-", "-"]


def test_equal_texts_are_shown_once():
    def run(setup, text):
        return SetupRun(row_of(setup, REPORT, "c"), text)

    grouped = texts_by_setup([run("a", "x"), run("b", "y"), run("c", "x")])
    assert grouped == {"x": ["a", "c"], "y": ["b"]}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Lets a shell script stand in for `baseline-generate`; gives a function that sets its body."""

    def install(body: str) -> None:
        script = tmp_path / "baseline-generate"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(demo, "console_script", lambda name: str(tmp_path / name))

    return install


@pytest.mark.parametrize("gpu", [False, True])
def test_runs_every_setup_in_order(stand_in, tmp_path, monkeypatch, gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    setups = [setup for setup in SETUPS if gpu or "graph" not in setup]
    assert len(setups) == (9 if gpu else 6)
    stand_in(f"echo 'loading'\necho '{json.dumps(REPORT)}'")
    announced = []
    runs = run_setups(tmp_path, announced.append)
    assert announced == [run.row.setup for run in runs] == setups
    assert all(run.text == "Blue." for run in runs)
    by_setup = {run.row.setup: run.row.command or "" for run in runs}
    assert "--quantization rowint8 --fused --mode compile" in by_setup["int8-fused-compile"]
    assert "rowint8" not in by_setup["bf16-eager"]
    assert len(set(by_setup.values())) == len(setups)


def test_a_failing_engine_shows_the_end_of_its_log(stand_in):
    stand_in("seq 1 100 >&2\necho 'no such model' >&2\nexit 3")
    with pytest.raises(EvalError, match=r"(?s)`baseline-generate .*exit status 3.*no such model") as failed:
        run_setup(Path("nowhere"), "bf16-eager")
    assert "\n50\n" not in str(failed.value)


def test_flags_exist_in_the_real_command():
    """`baseline-generate` accepts the flags of a setup; the missing model is all that it complains about."""
    with pytest.raises(EvalError, match="no-such-folder"):
        run_setup(Path("/no-such-folder"), "int8-fused-eager")
