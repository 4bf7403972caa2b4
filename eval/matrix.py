"""Measures what results/ holds of a GPU, one file after another: `python scripts/measure.py vllm serve` (default: all).

A log of each measurement is in the folder `logs` beside its file. One that fails or takes too long does not stop the
next, and keeps what it has measured. The last line says what failed. CUDA_VISIBLE_DEVICES chooses the GPU.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rowint8.eval.processes import stop

START = "from rowint8.eval.cli.app import main; main()"
"""Runs `rowint8` wherever its script may be."""
STOP_TIMEOUT = 20.0
"""Seconds that a measurement has to end its engines, before it is killed with them."""
TP2 = "-tp2"
"""Ends the name of a measurement on two GPUs."""

MEASUREMENTS = {
    "kernels": "bench kernels --peers",
    "kernels-norm": "bench kernels --peers --shapes h4096",
    "kernels-compile": "bench kernels --compile --shapes gate_up,h4096",
    "kernels-fp16": "bench kernels --dtype float16",
    "kernels-models": "bench kernels --shapes lm_head,llama-3.1-70b-tp8,qwen2.5-1.5b,qwen2.5-0.5b",
    "kernels-humming": "bench kernels --humming --shapes qkv,o,gate_up,down --tokens 1,16,64,256",
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


def result_file(results: Path, name: str, card: str) -> Path:
    """Such as results/vllm-h100.json, on two GPUs results/vllm-h100x2.json."""
    return results / f"{name.removesuffix(TP2)}-{card}{'x2' if name.endswith(TP2) else ''}.json"


def measure(name: str, file: Path, more: list[str], timeout: float) -> bool:
    """Runs one measurement; whether it succeeded."""
    log = file.parent / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", START, *shlex.split(MEASUREMENTS[name]), *more, "--json", str(file)]
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process, STOP_TIMEOUT)
    said = {0: "done", None: "took too long"}.get(code, f"failed with exit status {code}")
    print(f"{name}: {said} after {time.monotonic() - began:.0f} s, log in {log}", flush=True)
    return code == 0


def card() -> str:
    """Of the first GPU, as in the names of result files: "h100"."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("measure: torch finds no CUDA GPU here, and these measurements are of one")
    return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MEASUREMENTS), help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder for the files")
    parser.add_argument("--data", help="folder with the test sets of the quality tasks; default: from the hub")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each measurement")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in MEASUREMENTS]:
        parser.error(f"{', '.join(unknown)} is no measurement; accepted are {', '.join(MEASUREMENTS)}")
    kind = card()
    more = {"quality": ["--data", asked.data]} if asked.data else {}
    files = {name: result_file(asked.results, name, kind) for name in asked.names}
    failed = [name for name, file in files.items() if not measure(name, file, more.get(name, []), asked.timeout)]
    if failed:
        sys.exit(f"measure: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
