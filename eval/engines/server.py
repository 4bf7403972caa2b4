"""A real `vllm serve` for as long as a `with` block lasts."""

import random
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.processes import console_script, failure, running, vllm_environment

START_TIMEOUT = 600.0
"""Seconds. A first start on a GPU may compile for minutes."""
STOP_TIMEOUT = 20.0
"""Seconds after SIGINT before the server and its engine processes are killed."""


@contextmanager
def vllm_server(model: Path, options: Sequence[str] = (), ranks: int = 1) -> Iterator[str]:
    """Serves `model` on 127.0.0.1 and a free port; yields the base URL for an OpenAI client, stops it at the end.

    `options` are flags of `vllm serve`, `ranks` is the tensor-parallel size that they name. Nothing is left running,
    whatever happens in the block.

    Raises:
        EvalError: vLLM is not installed, or the server died or did not answer; the message holds the end of its log.
    """
    port = free_port()
    command = [console_script("vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    with (
        tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as log,
        running(command, vllm_environment(ranks), STOP_TIMEOUT, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        if not wait_until_healthy(process, f"http://127.0.0.1:{port}/health"):
            log.seek(0)
            raise EvalError(failure(command, process.poll(), log.read()))
        yield f"http://127.0.0.1:{port}/v1"


_PORTS = range(20_000, 30_000)
"""Below those that Linux hands out, of which another program may get one before a server that was told of it starts."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise EvalError(f"no port of 127.0.0.1 is free in {_PORTS}")


def wait_until_healthy(process: subprocess.Popen, url: str, timeout: float = START_TIMEOUT) -> bool:
    """Waits for `url` to answer 200; False when the process ends first or `timeout` seconds pass."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False
