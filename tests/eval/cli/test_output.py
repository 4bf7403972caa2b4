"""Result files that several runs of a command fill."""

import json
from contextlib import suppress
from typing import Any

import pytest

from rowint8.eval.cli.output import Kept, save
from rowint8.eval.errors import EvalError
from rowint8.eval.results.files import read_results
from rowint8.eval.results.schema import AgreementRow, ServeRow

TIMES = {"p50": 1.0, "p99": 2.0}


def row(setup: str, tok_s: float = 5.0) -> ServeRow:
    rest: dict[str, Any] = dict(request_rate=1.0, requests=2, prompt_tokens=3, output_tokens=4, goodput=1.0)
    rest |= dict(ttft_ms=TIMES, tpot_ms=TIMES, itl_ms=TIMES, goodput_limits_ms={"ttft": 5.0})
    return ServeRow(engine="vllm", setup=setup, tok_s=tok_s, command="vllm bench serve", **rest)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "serve.json"
    kept = Kept(path, ServeRow, False)
    kept.add([row("bf16")])
    kept.add([row("fp8")])
    return path


def test_rows_are_in_the_file_as_soon_as_they_are_added(file):
    assert read_results(file).rows == (row("bf16"), row("fp8"))


def test_appending_replaces_its_own_setups_and_keeps_the_others(file):
    first = read_results(file).command
    kept = Kept(file, ServeRow, True)
    kept.add([row("bf16", tok_s=7.0), row("rowint8")])
    kept.close(ended=True)
    results = read_results(file)
    assert results.rows == (row("bf16", tok_s=7.0), row("fp8"), row("rowint8"))
    assert results.command == f"{first} && {first}"


def test_a_setup_that_failed_loses_no_rows(file):
    def run(name):
        if name == "bf16":
            raise EvalError("out of memory")
        yield row(name)

    assert Kept(file, ServeRow, True).measure(["bf16", "rowint8"], run) == ["bf16"]
    assert read_results(file).rows == (row("bf16"), row("fp8"), row("rowint8"))


def test_a_file_names_its_commands_that_did_not_end(tmp_path, monkeypatch):
    path = tmp_path / "serve.json"

    def measure(name, failed=False, ends=True):
        monkeypatch.setattr("sys.argv", ["rowint8", name])
        kept = Kept(path, ServeRow, True)
        with suppress(KeyboardInterrupt), kept:
            kept.add([row(name)])
            if not ends:
                raise KeyboardInterrupt
            if failed:
                with pytest.raises(EvalError, match="failed: x"):
                    kept.finish(["x"])
                raise KeyboardInterrupt
        return read_results(path).cut

    assert measure("a", ends=False) == ("rowint8 a",)
    assert measure("b", failed=True) == ("rowint8 a", "rowint8 b")
    assert measure("c") == ("rowint8 a", "rowint8 b")
    assert measure("a") == ("rowint8 b",)
    assert measure("b") == ()
    assert '"cut"' not in path.read_text()


def test_code_that_differs_in_words_alone_may_append(file):
    content = json.loads(file.read_text())
    content["environment"] |= {"git_commit": "other", "git_dirty": True}
    file.write_text(json.dumps(content))
    Kept(file, ServeRow, True)
    content["environment"]["code"] = "0123456789abcdef"
    file.write_text(json.dumps(content))
    with pytest.raises(
        EvalError, match=r"measured elsewhere, so nothing is appended: code 0123456789abcdef and \w{16}$"
    ):
        Kept(file, ServeRow, True)


def test_nothing_is_appended_to_what_another_machine_measured(file):
    content = json.loads(file.read_text())
    content["environment"]["device"] = "another card"
    file.write_text(json.dumps(content))
    with pytest.raises(EvalError, match=r"measured elsewhere.*device another card and"):
        Kept(file, ServeRow, True)
    assert json.loads(file.read_text()) == content


def test_nothing_is_appended_to_rows_of_another_kind(file):
    content = file.read_text()
    with pytest.raises(EvalError, match=r"serve\.json holds rows of kind serve, which this command does not write"):
        Kept(file, AgreementRow, True)
    assert file.read_text() == content


def test_appending_needs_a_file():
    with pytest.raises(EvalError, match="--append keeps the rows of a file; name it with --json"):
        Kept(None, ServeRow, True)


def test_the_command_tells_no_places_of_this_machine(tmp_path, monkeypatch):
    file = tmp_path / "serve.json"
    arguments = ["--data", "../shared/data", "--model", "models/small", f"--text={tmp_path}/book.txt", "--limit=5"]
    monkeypatch.setattr("sys.argv", ["/bin/rowint8", "quality", *arguments, "--json", str(file)])
    save(file, [row("bf16")])
    told = "rowint8 quality --data data --model models/small --text=book.txt --limit=5 --json serve.json"
    assert read_results(file).command == told


def test_a_lock_leaves_no_file_that_keeps_other_users_out(file, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    Kept(file, ServeRow, True).add([row("int8")])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["serve.json", "temporary"]
    assert len(read_results(file).rows) == 3


def test_two_processes_append_to_one_file_at_the_same_time(tmp_path):
    path = tmp_path / "serve.json"
    both = [Kept(path, ServeRow, True), Kept(path, ServeRow, True)]
    for tok_s in (5.0, 6.0):
        for name, kept in zip(("bf16", "fp8"), both, strict=True):
            kept.add([row(name, tok_s)])
    results = read_results(path)
    assert sorted((each.setup, each.tok_s) for each in results.rows) == [
        ("bf16", 5.0),
        ("bf16", 6.0),
        ("fp8", 5.0),
        ("fp8", 6.0),
    ]
    assert results.command.count(" && ") == 1, "each command once"


def test_rows_that_come_quickly_are_written_together(tmp_path):
    path = tmp_path / "serve.json"
    kept = Kept(path, ServeRow, False, every_s=60)
    for name in ("bf16", "fp8", "rowint8"):
        kept.add([row(name)])
    assert [each.setup for each in read_results(path).rows] == ["bf16"]
    kept.close(ended=True)
    assert [each.setup for each in read_results(path).rows] == ["bf16", "fp8", "rowint8"]
