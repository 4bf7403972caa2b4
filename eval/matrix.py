"""What is measured for a release: every file of results/ that a GPU makes, and the command `rowint8 matrix`.

A file is measured in pieces, each a command of its own that appends to it. A file names the commands that made it and
those that did not come to their end, the machine and the code; so what a run was cut in is measured by the next one,
also where there is no git. On a machine with several GPUs the files of one GPU are measured side by side.
"""

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rowint8.eval.errors import EvalError
from rowint8.eval.processes import console_script, running

if TYPE_CHECKING:
    from rowint8.eval.results.files import Environment

STOP_TIMEOUT = 20.0
"""Seconds that a measurement has to end its engines, before it is killed with them."""
_VLLM = "0.33"
"""The version that a release is measured on, but for the file that says another."""
_BATCHES = "1x128x128,8x128x128,32x128x128,128x128x128,256x128x128"
_PROMPTS = "1x1100x1,1x2048x1,8x1024x1"


@dataclass(frozen=True)
class Measurement:
    """One result file."""

    arguments: str
    """Arguments of `rowint8`."""
    pieces: tuple[str, ...] = ()
    """More arguments of each command that appends to the file; () where one command writes it."""
    gpus: int = 1
    vllm: str = _VLLM
    """The vLLM that must be installed, as its version begins; "" where it does not matter."""


def _setups(names: str) -> tuple[str, ...]:
    return tuple(f"--setups {name}" for name in names.split(","))


def _shapes(*names: str) -> tuple[str, ...]:
    return tuple(f"--shapes {name}" for name in names)


_LAYER = ("gate_up", "down", "qkv", "o")
_OTHERS = ("lm_head", "llama-3.1-70b-tp8", "qwen2.5-7b", "gemma-2-9b", "qwen2.5-1.5b", "qwen2.5-0.5b")
_DENSE = _setups("bf16,rowint8,rowint8-a8,fp8,fp8_per_channel,w8a8,w8a16")
_EXPERTS = _setups("bf16,rowint8,rowint8-a8,fp8,fp8_per_channel")
_SHARDED = _setups("bf16,rowint8,rowint8-a8,fp8_per_channel")
_LARGE = "--workloads 1x128x128,32x128x128,128x128x128,256x128x128,8x1024x1"
MEASUREMENTS = {
    "kernels": Measurement("bench kernels --peers --humming", _shapes(*_LAYER, "h4096")),
    "kernels-int8": Measurement("bench kernels --op linear_int8,swiglu_int8", _shapes(*_LAYER, "llama-3.1-70b-tp8")),
    "kernels-models": Measurement("bench kernels", _shapes(*_OTHERS), vllm=""),
    "kernels-compile": Measurement("bench kernels --compile", _shapes("gate_up", "h4096"), vllm=""),
    "experts": Measurement("bench kernels --op experts --peers", _shapes("qwen3-30b-a3b", "mixtral-8x7b")),
    "chain": Measurement("bench chain"),
    "engine": Measurement(
        f"bench engine --sequences 256 --workloads {_BATCHES},{_PROMPTS}",
        _setups(
            "bf16-eager,bf16-compile,bf16-graph,int8,int8-fused,int8-a8,int8-fused-lm-head,vllm-bf16,vllm-rowint8,"
            "vllm-rowint8-a8"
        ),
    ),
    "vllm": Measurement("bench vllm", _DENSE),
    "vllm-0.26": Measurement("bench vllm", _setups("bf16,rowint8,rowint8-a8"), vllm="0.26"),
    "vllm-experts": Measurement("bench vllm --config qwen3-30b-a3b --layers 24", _EXPERTS),
    "vllm-mixtral": Measurement("bench vllm --config mixtral-8x7b --layers 24", _EXPERTS),
    "serve": Measurement(
        "bench serve --rates 4,12,24 --repeats 3 --goodput ttft:200,tpot:20", _setups("bf16,rowint8,rowint8-a8,fp8")
    ),
    "profile": Measurement("profile --batches 1,32", _setups("bf16-graph,int8-fused,int8-a8,vllm-bf16,vllm-rowint8")),
    "quality": Measurement(
        "quality --tasks lambada_openai,piqa,arc_easy,blimp_causative,wikitext "
        "--backends transformers,baseline-rowint8,baseline-rowint8-a8,vllm-rowint8,vllm-rowint8-a8"
    ),
    "agreement": Measurement("agreement --dtype float32"),
    "vllm-2": Measurement("bench vllm --config llama-3.1-70b --layers 64 --tensor-parallel-size 2", _SHARDED, gpus=2),
    "agreement-2": Measurement(
        "agreement --dtype float32 --tensor-parallel-size 2 --model models/smollm2-split2", gpus=2
    ),
    "vllm-4": Measurement(f"bench vllm --config llama-3.1-70b --tensor-parallel-size 4 {_LARGE}", _SHARDED, gpus=4),
    "vllm-qwen3-235b-4": Measurement(
        "bench vllm --config qwen3-235b-a22b --layers 64 --tensor-parallel-size 4 --enable-expert-parallel " + _LARGE,
        _SHARDED,
        gpus=4,
    ),
}
"""By name. agreement-2 needs `rowint8 demo-model --split-over 2 --out models/smollm2-split2`, quality the option --data
where there is no network."""


def matrix(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[NAME]...",
            help=f"Of {', '.join(MEASUREMENTS)}. Default: all that this machine's GPUs and vLLM can measure.",
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder for the files, and for a log of each.")] = Path("results"),
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with the test sets of the quality tasks. Default: from the hub."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, max=604_800, help="Seconds for each command.")] = 3600,
    list_: Annotated[bool, typer.Option("--list", help="Say what is done and what is left; measure nothing.")] = False,
) -> None:
    """Measure what results/ holds of a GPU; what this code has measured on this machine already is kept.

    A command that fails or takes too long keeps its rows so far, does not stop the next, and is tried again by the next
    run. A file of other code, versions or another card is moved to the folder logs. CUDA_VISIBLE_DEVICES chooses GPUs.

    Example: rowint8 matrix vllm serve
    """
    if unknown := [name for name in names or () if name not in MEASUREMENTS]:
        raise EvalError(f"{', '.join(unknown)} is no measurement; accepted are {', '.join(MEASUREMENTS)}")
    from rowint8.eval.results.environment import describe_environment

    kind, gpus, here = card(), visible_gpus(), describe_environment()
    chosen = names or [name for name, each in MEASUREMENTS.items() if _fits(each, len(gpus), here)]
    more = {"quality": ["--data", str(data)]} if data else {}
    files = {name: result_file(results, name, kind) for name in chosen}
    left = {name: missing(name, file, more.get(name, []), here) for name, file in files.items()}
    if list_:
        for name, commands in left.items():
            print(f"{files[name]}: {'done' if not commands else f'{len(commands)} commands left'}")
    elif failed := Runner(left, files, timeout).run(gpus):
        raise EvalError(f"failed: {', '.join(failed)}")


def _fits(measurement: Measurement, gpus: int, here: "Environment") -> bool:
    return measurement.gpus <= gpus and (here.vllm or "").startswith(measurement.vllm)


def result_file(results: Path, name: str, card: str) -> Path:
    """Such as results/vllm-h200.json, on two GPUs results/vllm-h200x2.json."""
    gpus = MEASUREMENTS[name].gpus
    return results / (f"{name}-{card}.json" if gpus == 1 else f"{name.removesuffix(f'-{gpus}')}-{card}x{gpus}.json")


def missing(name: str, file: Path, more: Sequence[str], here: "Environment") -> list[list[str]]:
    """Arguments of `rowint8` of each command that the file lacks; all where it is of another machine or other code."""
    from rowint8.eval.results.files import read_results, told_command

    measurement = MEASUREMENTS[name]
    whole = [[*shlex.split(measurement.arguments), *more]]
    pieces = [[*whole[0], *shlex.split(piece), "--append"] for piece in measurement.pieces]
    commands = [[*command, "--json", str(file)] for command in pieces or whole]
    try:
        found = read_results(file) if file.exists() else None
    except EvalError:
        return commands
    if found is None or found.environment.differences(here):
        return commands
    done = {*found.command.split(" && ")} - {*found.cut}
    return [command for command in commands if told_command(command, file) not in done]


class Runner:
    """Runs what is left of the measurements; a stop ends its commands with all that they started."""

    def __init__(self, left: Mapping[str, list[list[str]]], files: Mapping[str, Path], timeout: float) -> None:
        self._left, self._files, self._timeout = left, files, timeout
        self._stop = Event()

    def run(self, gpus: Sequence[str]) -> list[str]:
        """Measures each on a GPU that is free, then those that take several; the names of those that failed."""
        free: SimpleQueue[str] = SimpleQueue()
        for gpu in gpus:
            free.put(gpu)

        def on_a_free_gpu(name: str) -> bool:
            gpu = free.get()
            try:
                return self._measure(name, gpu)
            finally:
                free.put(gpu)

        single = [name for name in self._left if MEASUREMENTS[name].gpus == 1]
        with ThreadPoolExecutor(len(gpus)) as pool:
            try:
                done = dict(zip(single, pool.map(on_a_free_gpu, single), strict=True))
            except BaseException:
                self._stop.set()
                raise
        for name in self._left:
            if name not in done:
                done[name] = self._measure(name, ",".join(gpus))
        return [name for name in self._left if not done[name]]

    def _measure(self, name: str, gpus: str) -> bool:
        """Runs the commands on these GPUs, with a log in the folder logs beside the file; whether all succeeded."""
        file, commands = self._files[name], self._left[name]
        log = file.parent / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and len(commands) == max(1, len(MEASUREMENTS[name].pieces)):  # nothing of it counts
            file.replace(log.with_suffix(".older.json"))
        said = [self._command(name, command, gpus, log) for command in commands if not self._stop.is_set()]
        return all(said)

    def _command(self, name: str, arguments: list[str], gpus: str, log: Path) -> bool:
        began = time.monotonic()
        command, environment = [console_script("rowint8"), *arguments], {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
        with (
            log.open("a") as out,
            running(command, environment, STOP_TIMEOUT, stdout=out, stderr=subprocess.STDOUT) as process,
        ):
            code = self._wait(process)
        said = {0: "done", None: "took too long"}.get(code, f"failed with exit status {code}")
        print(
            f"{name}: {said} after {time.monotonic() - began:.0f} s, log in {log}: {shlex.join(arguments)}", flush=True
        )
        return code == 0

    def _wait(self, process: subprocess.Popen) -> int | None:
        """The exit status; None where the time is over, or all shall stop."""
        end = time.monotonic() + self._timeout
        while not self._stop.is_set() and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(1.0, max(0.0, end - time.monotonic())))
        return None


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def card() -> str:
    """The first GPU's name as in the names of result files, such as "h100".

    Raises:
        EvalError: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise EvalError("torch finds no CUDA GPU here, and these measurements are of one")
    return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
