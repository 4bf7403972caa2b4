"""What is measured for a release: every file of results/ that a GPU makes, and the command `rowint8 matrix`."""

import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from rowint8.eval.errors import EvalError
from rowint8.eval.processes import console_script, running

STOP_TIMEOUT = 20.0
"""Seconds that a measurement has to end its engines, before it is killed with them."""
TP2 = "-tp2"
"""Ends the name of a measurement on two GPUs."""

MEASUREMENTS = {
    "kernels": "bench kernels --peers",
    "kernels-norm": "bench kernels --peers --shapes h4096",
    "kernels-compile": "bench kernels --compile --shapes gate_up,h4096",
    "kernels-fp16": "bench kernels --dtype float16",
    "kernels-models": "bench kernels --shapes lm_head,llama-3.1-70b-tp8,qwen2.5-7b,gemma-2-9b,qwen2.5-1.5b,"
    "qwen2.5-0.5b",
    "kernels-humming": "bench kernels --humming --shapes qkv,o,gate_up,down --tokens 1,16,64,256",
    "chain": "bench chain",
    "engine": "bench engine --sequences 256",
    "vllm": "bench vllm",
    "serve": "bench serve --rates 12,24 --goodput ttft:200,tpot:20",
    "profile": "profile --setups bf16-graph,int8-fused,vllm-bf16,vllm-rowint8 --batches 1,32",
    "quality": "quality --tasks lambada_openai,piqa,arc_easy,blimp_causative,wikitext "
    "--backends transformers,baseline-rowint8,vllm-rowint8",
    "agreement": "agreement --dtype float32",
    "vllm-tp2": "bench vllm --config llama-3.1-70b --layers 64 --tensor-parallel-size 2 --setups bf16,rowint8,fp8 "
    "--workloads 1x128x128,32x128x128,128x128x128",
    "agreement-tp2": "agreement --dtype float32 --tensor-parallel-size 2 --model models/smollm2-split2",
}
"""Name to arguments of `rowint8`. agreement-tp2 needs `rowint8 demo-model --split-over 2 --out models/smollm2-split2`,
quality the option --data where there is no network."""


def matrix(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[NAME]...", help=f"Of {', '.join(MEASUREMENTS)}. Default: all."),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder for the files, and for a log of each.")] = Path("results"),
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with the test sets of the quality tasks. Default: from the hub."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, max=604_800, help="Seconds for each measurement.")] = 3600,
) -> None:
    """Measure what results/ holds of a GPU, one file after another; CUDA_VISIBLE_DEVICES chooses the GPU.

    A measurement that fails or takes too long keeps its rows so far and does not stop the next.

    Example: rowint8 matrix vllm serve
    """
    chosen = names or list(MEASUREMENTS)
    if unknown := [name for name in chosen if name not in MEASUREMENTS]:
        raise EvalError(f"{', '.join(unknown)} is no measurement; accepted are {', '.join(MEASUREMENTS)}")
    kind = card()
    more = {"quality": ["--data", str(data)]} if data else {}
    files = {name: result_file(results, name, kind) for name in chosen}
    if failed := [name for name, file in files.items() if not measure(name, file, more.get(name, []), timeout)]:
        raise EvalError(f"failed: {', '.join(failed)}")


def result_file(results: Path, name: str, card: str) -> Path:
    """Such as results/vllm-h100.json, on two GPUs results/vllm-h100x2.json."""
    return results / f"{name.removesuffix(TP2)}-{card}{'x2' if name.endswith(TP2) else ''}.json"


def measure(name: str, file: Path, more: list[str], timeout: float) -> bool:
    """Runs one measurement, with a log in the folder logs beside its file; whether it succeeded."""
    log = file.parent / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [console_script("rowint8"), *shlex.split(MEASUREMENTS[name]), *more, "--json", str(file)]
    began = time.monotonic()
    with (
        log.open("w") as out,
        running(command, os.environ, STOP_TIMEOUT, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
    said = {0: "done", None: "took too long"}.get(code, f"failed with exit status {code}")
    print(f"{name}: {said} after {time.monotonic() - began:.0f} s, log in {log}", flush=True)
    return code == 0


def card() -> str:
    """The first GPU's name as in the names of result files, such as "h100".

    Raises:
        EvalError: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise EvalError("torch finds no CUDA GPU here, and these measurements are of one")
    return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
