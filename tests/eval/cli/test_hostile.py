"""Arguments, files and streams that a shell can give any command: one line and an exit status, and no hang."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from rowint8.eval.cli import app as command
from rowint8.eval.cli.output import out
from rowint8.eval.tables import Table
from tests.eval.cli.test_app import rowint8

LONG = "n" * 300
NO_UTF8 = "\udcff"
MARKUP = "[/bold]"
METHOD = {"quant_method": "rowint8"}


def short(value):
    return ascii(value)[:40]


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs the command in this process, in a folder of broken files; what it wrote to stderr, one line and status 1."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1, 2]")
    (tmp_path / "words").mkdir()
    words = dict.fromkeys(("hidden_size", "max_position_embeddings", "vocab_size"), "x")
    (tmp_path / "words" / "config.json").write_text(json.dumps({"model_type": "llama", **words}))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "config.json")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["rowint8", *arguments])
        handler, start = signal.getsignal(signal.SIGTERM), time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            command.main()
        signal.signal(signal.SIGTERM, handler)
        said = capfd.readouterr()
        assert stopped.value.code == 1
        assert said.out == ""
        assert said.err.startswith("rowint8: ")
        assert said.err.count("\n") == 1
        assert time.monotonic() - start < 60
        return said.err

    return run


@pytest.mark.parametrize("name", ["latin.txt", "bad.jsonl", "list/config.json", "words/config.json"])
def test_a_result_file_replaces_nothing_else(run, tmp_path, name):
    before = (tmp_path / name).read_bytes()
    assert f"{name} is there and holds something else" in run("doctor", "--json", name)
    assert (tmp_path / name).read_bytes() == before


FOLDERS = [LONG, NO_UTF8, MARKUP, "", "/dev/null", "pipe", "latin.txt", "list", "words", "piped"]
TAKES_A_MODEL = [("quality", "--model"), ("agreement", "--model"), ("tune", "--model"), ("quantize",), ("doctor",)]


@pytest.mark.parametrize("before", TAKES_A_MODEL, ids=" ".join)
@pytest.mark.parametrize("folder", FOLDERS, ids=short)
def test_what_is_no_model_is_one_line(run, before, folder):
    run(*before, folder, *(["out"] if before == ("quantize",) else []))


@pytest.mark.parametrize(
    "command",
    [
        ("quality",),
        ("agreement",),
        ("demo", "--no-vllm"),
        ("bench", "engine"),
        ("bench", "vllm", "--setups", "bf16"),
        ("bench", "serve"),
        ("profile",),
        ("fidelity", "--text", "latin.txt"),
    ],
    ids=" ".join,
)
def test_int8_weights_are_never_measured_as_the_original_ones(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr("rowint8.eval.cli.bench.warn_if_busy", lambda: None)
    monkeypatch.setattr("rowint8.eval.cli.profile.warn_if_busy", lambda: None)
    shape = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=64, hidden_size=64)
    (tmp_path / "list" / "config.json").write_text(json.dumps(shape | {"quantization_config": METHOD}))
    said = run(*command, "--model", "list")
    assert "list is already quantized (rowint8); give the fp32, bf16 or fp16 original" in said


@pytest.mark.parametrize(
    "text", [LONG, NO_UTF8, MARKUP, "", ".", "/dev/null", "pipe", "latin.txt", "bad.jsonl"], ids=short
)
def test_what_is_no_text_is_one_line(run, smollm2, text):
    run("fidelity", "--model", str(smollm2), "--text", text)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "~", LONG, MARKUP, "a/b/c", "..", "/", "http://x/y"])
def test_what_is_no_source_is_one_line(run, name):
    assert MARKUP not in name or name in run("quantize", name, "out")
    run("quantize", name, "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo-model", "--out", LONG),
        ("demo-model", "--out", "latin.txt/x"),
        ("demo-model", "--out", "pipe"),
        ("demo", "--no-vllm", "--model", LONG),
        ("demo", "--no-vllm", "--model", MARKUP),
        ("quality", "--backends", MARKUP),
        ("quality", "--lm-eval-output", "latin.txt"),
        ("quality", "--lm-eval-output", "/dev/null/x"),
        ("fidelity", "--text", "latin.txt", "--quantization", NO_UTF8),
        ("bench", "kernels", "--tokens", "9" * 5000),
        ("bench", "kernels", "--tokens", "9" * 12),
        ("bench", "kernels", "--tokens", "\u0661"),
        ("bench", "kernels", "--shapes", MARKUP),
        ("tune", "--minutes", "inf"),
        ("tune", "--tokens", ""),
        ("bench", "chain", "--tokens", ""),
        ("bench", "kernels", "--tokens", ""),
        ("bench", "engine", "--setups", ""),
        ("bench", "vllm", "--setups", ""),
        ("profile", "--setups", ""),
    ],
    ids=short,
)
def test_other_arguments_are_one_line(run, smollm2, arguments):
    run(*arguments, *(["--model", str(smollm2)] if arguments[0] in ("quality", "fidelity") else []))


def shell(line, **environment):
    """The line of a shell in which $ROWINT8 is the command."""
    program = f"{sys.executable} -c 'from rowint8.eval.cli.start import main; main()'"
    env = {**os.environ, "ROWINT8": program, **environment}
    return subprocess.run(
        ["bash", "-c", line.replace("$ROWINT8", program)], capture_output=True, env=env, timeout=120, check=False
    )


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    done = shell(f"$ROWINT8 --version {closed}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"" if " >&-" in f" {closed}" else done.stdout.startswith(b"rowint8 ")


def test_a_checkpoint_is_whole_when_all_streams_are_closed(tmp_path):
    """A file that is opened must not take the descriptor of stdout, where libraries print."""
    from tests.eval.quantize.harness import assert_holds, write_original

    folder = write_original(tmp_path / "model")
    done = shell(f"$ROWINT8 quantize {folder} {tmp_path}/out <&- >&- 2>&-")
    assert done.returncode == 0
    assert_holds(tmp_path / "out", folder)


@pytest.mark.parametrize("arguments", ["--version", "--help", "bench --help"])
def test_a_full_disk_behind_stdout_is_one_line(arguments):
    if not os.path.exists("/dev/full"):
        pytest.skip("this machine has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*rowint8_command(), *arguments.split()], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "rowint8: No space left on device\n"


def rowint8_command():
    return [sys.executable, "-c", "from rowint8.eval.cli.start import main; main()"]


FIRST_IMPORT = (
    "sys.meta_path.insert(0, type('Says', (), {'find_spec': lambda *_: sys.meta_path.pop(0) and print(flush=True)})())"
)
"""Prints a line at the first import from here on, which is then done as always."""


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.15, 0.2, 0.5])
def test_an_interrupt_while_libraries_load_is_no_traceback(delay):
    code = f"from rowint8.eval.cli.start import main; import sys; {FIRST_IMPORT}; main()"
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code, "doctor"], **pipes)
    assert process.stdout is not None
    process.stdout.readline()  # libraries begin to load
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, b"")


def test_a_reader_that_stops_is_no_traceback():
    done = shell("$ROWINT8 --help | true; echo ${PIPESTATUS[0]}")
    assert done.stderr == b""


def test_a_stdout_of_ascii_gets_escapes(tmp_path):
    from tests.eval.quantize.harness import write_original

    write_original(tmp_path / "modèle")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(f"cd {tmp_path}; $ROWINT8 quantize modèle 'größe'", **ascii_only)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"linear layers in INT8" in done.stdout
    assert (tmp_path / "größe" / "config.json").exists()


def test_wrong_usage_of_any_bytes_is_no_traceback():
    for argument in (MARKUP, NO_UTF8, LONG, "--" + MARKUP):
        done = rowint8(argument)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_names_in_tables_are_no_markup(capsys):
    out.print(Table(["setup", "n"], [[f"a{MARKUP}b", "[1]"]], title=f"of {MARKUP}", note=MARKUP))
    assert capsys.readouterr().out.count(MARKUP) == 3
