"""The command `rowint8`: help, quickness, and errors in one line without a traceback."""

import signal
import subprocess
import sys

import pytest

from rowint8.eval.processes import console_script


def rowint8(*arguments, **options):
    return subprocess.run(
        [console_script("rowint8"), *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.mark.parametrize(
    "command",
    [(), ("demo",), ("demo-model",), ("quality",), ("profile",), ("doctor",), ("bench", "kernels")],
)
def test_help_has_an_example(command):
    done = rowint8(*command, "--help")
    assert done.returncode == 0
    assert "Example: rowint8" in done.stdout


def test_version():
    from importlib.metadata import version

    assert rowint8("--version").stdout == f"rowint8 {version('rowint8')}\n"


def test_cli_imports_nothing_heavy():
    program = (
        "import rowint8.eval.cli.app, sys; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quality", "--model", "/nowhere"), "/nowhere is not a model folder"),
        (("demo", "--model", "/nowhere", "--no-vllm"), "/nowhere is not a model folder"),
        (("quality", "--dtype", "int3"), "accepted are bfloat16, float16 and float32"),
        (("quality", "--backends", "vllm,hf"), "--backends has 'hf'; accepted are transformers, baseline, "),
        (("quality", "--tasks", "piqa", "--data", "tests"), "--data tests has no file for piqa; put its"),
        (("demo-model", "--out", "/proc/version"), "not a whole model"),
        (("bench", "kernels", "--shapes", "o,up"), "--shapes has up; accepted are llama-3.1-8b, "),
        (("bench", "kernels", "--tokens", "1,x"), "--tokens has 'x'; give whole numbers above 0"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = rowint8(*arguments)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("rowint8: ")
    assert message in line
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [("unknown",), ("quality", "--limit", "1"), ("demo", "--nonsense")])
def test_wrong_usage_exits_with_2(arguments):
    done = rowint8(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_unwinds(number):
    """`timeout` and `make` end a program with SIGTERM, a terminal with SIGHUP; it still stops what it started."""
    program = (
        "import rowint8.eval.cli.app as cli, time\n"
        "def app():\n"
        "    try:\n        print('up', flush=True); time.sleep(60)\n"
        "    finally:\n        print('unwound', flush=True)\n"
        "cli.app = app\ncli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.read() == "unwound\n"
    assert process.returncode == 128 + number
