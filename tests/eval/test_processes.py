"""rowint8.eval.processes: other programs run, and end with this one; engines/test_server.py stops servers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rowint8.baseline_engine.checkpoint import resolve_folder
from rowint8.eval.errors import EvalError
from rowint8.eval.processes import run_quietly, run_worker, running, vllm_environment


@pytest.fixture
def cpu_of_five_cores(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {8, 1, 2, 3, 4})
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)


@pytest.mark.parametrize(("ranks", "cores"), [(2, "1,2|3,4"), (4, "1|2|3|4"), (6, "1|2|3|4|8|1")])
@pytest.mark.usefixtures("cpu_of_five_cores")
def test_ranks_on_the_cpu_share_the_cores(ranks, cores):
    assert vllm_environment(ranks)["VLLM_CPU_OMP_THREADS_BIND"] == cores


@pytest.mark.usefixtures("cpu_of_five_cores")
def test_one_rank_takes_what_vllm_gives_it_and_the_users_word_stays(monkeypatch):
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert vllm_environment(2)["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"


SLEEPERS = ["/bin/sh", "-c", "sleep 600 & trap '' HUP INT TERM; echo $$ $! > pids; sleep 600"]
"""A program that ends by SIGKILL only, and its child."""
STARTS = {
    "running": "with running(SLEEPERS, os.environ): time.sleep(600)",
    "run_quietly": "run_quietly(SLEEPERS, os.environ)",
    "run_worker": "run_worker(subprocess.run, {'args': SLEEPERS}, os.environ)",
    "one in another": "run_quietly([sys.executable, '-c', PROGRAM + 'run_quietly(SLEEPERS, os.environ)'], os.environ)",
}
IMPORTS = f"""
import os, subprocess, sys, time
from rowint8.eval.processes import run_quietly, run_worker, running
SLEEPERS = {SLEEPERS!r}
"""
PROGRAM = f"{IMPORTS}PROGRAM = {IMPORTS!r}\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("start", STARTS)
def test_what_was_started_ends_with_the_program_that_started_it(tmp_path, start, number):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM + STARTS[start]], cwd=tmp_path, stderr=subprocess.DEVNULL)
    pids = [int(pid) for pid in _when_there(tmp_path / "pids").split()]
    everyone = [*psutil.Process(process.pid).children(recursive=True), *map(psutil.Process, pids)]
    assert all(map(_alive, everyone))
    process.send_signal(number)
    process.wait(10)
    deadline = time.monotonic() + 10
    while any(map(_alive, everyone)):
        assert time.monotonic() < deadline, "something is still there"
        time.sleep(0.05)


def _when_there(file: Path) -> str:
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "nothing was started"
        time.sleep(0.05)
    return file.read_text()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nobody_stays_to_watch_what_has_ended():
    before = psutil.Process().children()  # such as an engine that several tests share
    with running(["true"], os.environ) as process:
        process.wait()
        assert len(psutil.Process().children()) == len(before) + 1, "the watcher"
    assert psutil.Process().children() == before


def test_a_worker_answers_in_json_and_fails_with_the_end_of_its_log():
    assert run_worker(os.path.join, {"a": "x"}, os.environ) == "x"
    with pytest.raises(EvalError, match=r"(?s)posixpath:join` failed with exit status 1; first error: TypeError"):
        run_worker(os.path.join, {"b": "x"}, os.environ)


@pytest.mark.parametrize("model", ["nowhere/at/all", "~nobody-of-this-name"])
def test_what_a_worker_refuses_is_one_line(model):
    with pytest.raises(EvalError, match=f"^model '{model}' is no folder here[^\n]*$"):
        run_worker(resolve_folder, {"model": model}, os.environ)


def test_stdout_is_kept_apart_from_the_log():
    assert run_quietly(["/bin/sh", "-c", "echo log >&2; echo result"], os.environ) == "result\n"
    with pytest.raises(EvalError, match=r"(?s)`sh -c .*exit status 3; first error: none recognised.*result\nlog"):
        run_quietly(["/bin/sh", "-c", "echo log >&2; echo result; exit 3"], os.environ)
