"""rowint8.eval.engines.server: a server is reached, stopped, never left behind. An HTTP server stands in for vLLM."""

import subprocess
import sys
import time
from urllib.request import urlopen

import psutil
import pytest

from rowint8.eval.engines import server as serve
from rowint8.eval.engines.server import free_port, vllm_server
from rowint8.eval.errors import EvalError
from rowint8.eval.processes import stop

SERVER = """
import os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""
WITH_CHILD = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Lets a Python program stand in for the command `vllm`."""

    def install(program: str) -> None:
        script = tmp_path / "vllm"
        script.write_text(f"#!{sys.executable}\n{program}")
        script.chmod(0o755)
        monkeypatch.setattr(serve, "console_script", lambda name: str(script))

    return install


BEFORE: set[int] = set()
"""Processes that other tests of this session have left running, such as an engine that several of them share."""


@pytest.fixture(autouse=True)
def before():
    BEFORE.clear()
    BEFORE.update(children())


def children() -> set[int]:
    """Those of this test."""
    return {child.pid for child in psutil.Process().children(recursive=True)} - BEFORE


def gone(pids: set[int], seconds: float = 5) -> bool:
    """Whether all processes end within `seconds` (a killed grandchild takes a moment to disappear)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_server_answers_and_is_stopped(stand_in, tmp_path):
    stand_in(SERVER)
    with vllm_server(tmp_path) as base_url:
        running = children()
        assert running
        assert base_url.endswith("/v1")
        with urlopen(base_url.replace("/v1", "/health")) as answer:
            assert answer.status == 200
    assert gone(running)


def test_server_is_stopped_after_an_error_in_the_block(stand_in, tmp_path):
    stand_in(WITH_CHILD + SERVER)
    running = set()

    def fail():
        with vllm_server(tmp_path):
            running.update(children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len(running) == 3, "the server, its child and what watches over them"
    assert gone(running)


def test_a_server_that_ignores_sigint_is_killed():
    program = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        start = time.monotonic()
        stop(process, timeout=0.5)
        assert process.returncode == -9
        assert time.monotonic() - start < 10


def test_a_server_that_dies_shows_the_end_of_its_log(stand_in, tmp_path):
    stand_in("import sys\nprint('no such quantization')\nsys.exit(7)")
    with (
        pytest.raises(EvalError, match=r"(?s)`vllm serve .*exit status 7.*no such quantization"),
        vllm_server(tmp_path),
    ):
        pass


def test_a_silent_server_is_given_up(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(serve.wait_until_healthy, "__defaults__", (0.5,))
    stand_in("import time\ntime.sleep(600)")
    with pytest.raises(EvalError, match="did not answer in time"), vllm_server(tmp_path):
        pass
    assert gone(children())


def test_free_ports_can_be_bound():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
