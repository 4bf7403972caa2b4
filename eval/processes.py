"""Other programs, run as a user would run them: their log kept out of sight and shown where they fail."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rowint8.eval.errors import EvalError

LOG_LINES_SHOWN = 30
_ERROR_LINE = re.compile(r"\b\w*(Error|Exception)\b: ")


def console_script(name: str) -> str:
    """Path of an installed command: next to this Python, else on PATH.

    Raises:
        EvalError: there is none.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise EvalError(f"the command {name} is not installed next to {sys.executable} nor on PATH")
    return found


def run_quietly(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Runs a command to its end and returns its stdout.

    Raises:
        EvalError: it failed; the message holds the end of what it wrote.
    """
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    with running(command, env, **pipes) as process:
        out, log = process.communicate()
    if process.returncode != 0:
        raise EvalError(failure(command, process.returncode, out + log))
    return out


def run_worker(
    function: Callable[..., Any], request: Mapping[str, Any], env: Mapping[str, str], timeout: float | None = None
) -> Any:
    """Calls `function(**request)` in a new Python process (see `worker`); request and result are JSON files.

    Nothing is left running. A result that was written counts even if an engine then fails to stop.

    Raises:
        EvalError: it refused what it was given, in one line; or it failed or took more than `timeout` seconds, and the
            message holds the end of what it wrote.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    with tempfile.TemporaryDirectory() as scratch:
        given, result, log = (Path(scratch) / file for file in ("request.json", "result.json", "log"))
        given.write_text(json.dumps(request))
        command = [sys.executable, "-m", "rowint8.eval.worker", name, str(given), str(result)]
        with log.open("w") as stream, running(command, env, stdout=stream, stderr=subprocess.STDOUT) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            returncode = process.returncode
        if not result.exists():
            raise EvalError(failure([command[0], name], returncode, log.read_text(encoding="utf-8", errors="replace")))
        answer = json.loads(result.read_text())
    if isinstance(answer, dict) and answer.keys() == {"refused"}:
        raise EvalError(answer["refused"])
    return answer


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], stop_timeout: float = 0, **options: Any
) -> Iterator[subprocess.Popen]:
    """A command in a session of its own, for as long as the block lasts; killed if this process dies in between.

    It begins only when it is watched, and has nothing to read from stdin.

    Args:
        stop_timeout: seconds that it has at the end, after SIGINT, before it is killed with all that it started.
        options: as of `subprocess.Popen`.
    """
    with _watcher() as watch:
        waiting = ["/bin/sh", "-c", 'read _ && exec "$@"', "sh", *command]
        options |= dict(stdin=subprocess.PIPE, start_new_session=True)
        process: Any = subprocess.Popen(waiting, env=env, **options)
        try:
            watch(process.pid)
            with process.stdin as begins:
                os.write(begins.fileno(), b"\n")
            process.stdin = None
            yield process
        finally:
            stop(process, stop_timeout)


@contextmanager
def _watcher() -> Iterator[Callable[[int], None]]:
    """A process that outlives this one, however it ends, and then kills the group that it was told.

    It waits for the end of its stdin, which only this process holds open.
    """
    watch = ["/bin/sh", "-c", 'read group; read _; kill -KILL "-$group"']
    quiet: dict[str, Any] = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    with subprocess.Popen(watch, stdin=subprocess.PIPE, text=True, bufsize=1, **quiet) as watcher:
        try:
            yield lambda group: print(group, file=watcher.stdin, flush=True)
        finally:
            watcher.kill()


def stop(process: subprocess.Popen, timeout: float) -> None:
    """Asks a process that leads its own session to stop (SIGINT), then kills what is left of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure(command: Sequence[str], returncode: int | None, log: str) -> str:
    """The message for a command that failed: how it ended, the first error in its log, the log's end and its file.

    The first error matters where several processes write: the last ones only say that the first one is gone. Warnings
    are left out; vLLM writes the traceback of a missing tokenizer as one.
    """
    name = " ".join([Path(command[0]).name, *command[1:3]])
    how = "did not answer in time" if returncode is None else f"failed with exit status {returncode}"
    lines = [line for line in log.strip().splitlines() if " WARNING " not in line]
    if not lines:
        return f"`{name}` {how}; it wrote nothing"
    with tempfile.NamedTemporaryFile("w", prefix="rowint8-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(log)
    first = next((line.strip() for line in lines if _ERROR_LINE.search(line)), "none recognised")
    end = "\n".join(lines[-LOG_LINES_SHOWN:])
    return f"`{name}` {how}; first error: {first}\nthe end of its log, which is in {file.name}:\n{end}"


def require_package(name: str, how: str) -> None:
    """Raises EvalError unless `name` can be imported; `how` says how to install it."""
    if importlib.util.find_spec(name) is None:
        raise EvalError(f"{name} is not installed; {how}")


def vllm_environment(ranks: int = 1) -> dict[str, str]:
    """This process's environment with what vLLM needs to run here: no network, no reports, a small KV cache on the CPU,
    where several ranks share the cores (by itself vLLM gives each a NUMA node, and few machines have several).

    What the user has set stays.
    """
    import torch

    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        settings["VLLM_CPU_KVCACHE_SPACE"] = "1"
        if ranks > 1:
            settings["VLLM_CPU_OMP_THREADS_BIND"] = _shared_cores(ranks)
    elif importlib.util.find_spec("flashinfer") is None:
        settings["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return {**settings, **os.environ}


def _shared_cores(ranks: int) -> str:
    """Such as "0,1|2,3": this process's cores in equal parts, as vLLM wants them."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(len(cores) // ranks, 1)
    parts = [cores[rank * each % len(cores) :][:each] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)
