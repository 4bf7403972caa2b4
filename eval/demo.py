"""The main job on a real model: the small engine setup by setup, then one completion from the real vLLM server.

Every setup is one run of the public command `baseline-generate` in a process of its own, so that its peak memory is its
own. The rows go into one table and, if asked, into a result file.
"""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowint8.eval.engines.server import vllm_server
from rowint8.eval.processes import console_script, run_quietly
from rowint8.eval.results.schema import GIB, GenerationRow
from rowint8.eval.tables import Table

PROMPT = "Explain in a few sentences why the sky is blue."
MAX_TOKENS = 32
MAX_MODEL_LEN = 512

_WEIGHTS = {
    "bf16": (),
    "int8": ("--quantization", "rowint8", "--no-fused"),
    "int8-fused": ("--quantization", "rowint8", "--fused"),
}
SETUPS = {
    f"{weights}-{mode}": (*flags, "--mode", mode)
    for weights, flags in _WEIGHTS.items()
    for mode in ("eager", "compile", "graph")
}
"""Setup to the flags of `baseline-generate`; graph needs a GPU. Speedups are over the first."""


@dataclass(frozen=True)
class SetupRun:
    """One run of `baseline-generate`: its row and what it wrote."""

    row: GenerationRow
    text: str


def run_setup(model: Path, setup: str) -> SetupRun:
    """Runs one of SETUPS: one chat prompt, greedy, at most MAX_TOKENS tokens, after one unmeasured run.

    Raises:
        EvalError: the run failed; the message holds the end of its log.
    """
    flags = ["--model", str(model), "--prompt", PROMPT, "--chat", "--max-tokens", str(MAX_TOKENS)]
    flags += ["--temperature", "0", "--warmup", "1", "--dtype", "bfloat16", *SETUPS[setup], "--json"]
    output = run_quietly([console_script("baseline-generate"), *flags], dict(os.environ))
    report = json.loads(output.strip().splitlines()[-1])
    return SetupRun(row_of(setup, report, shlex.join(["baseline-generate", *flags])), report["texts"][0])


def row_of(setup: str, report: dict[str, Any], command: str) -> GenerationRow:
    """The row of one run from the JSON object that `baseline-generate --json` ends with."""
    metrics = report["metrics"]
    (request,) = metrics["requests"]
    return GenerationRow(
        engine="baseline",
        setup=setup,
        batch=1,
        prompt_tokens=request["prompt_tokens"],
        output_tokens=request["output_tokens"],
        ttft_ms=metrics["ttft_ms"],
        itl_ms=metrics["itl_ms"],
        tpot_ms=metrics["tpot_ms"],
        tok_s=metrics["tok_s"],
        weights_gib=metrics["weight_bytes"] / GIB,
        peak_mem_gib=metrics["peak_mem_bytes"] / GIB,
        command=command,
    )


def run_setups(model: Path, announce: Callable[[str], None]) -> list[SetupRun]:
    """Runs those of SETUPS that can run here, in order; `announce` is told the name of each before it starts."""
    import torch

    runs = []
    for setup in SETUPS:
        if torch.cuda.is_available() or not setup.endswith("graph"):
            announce(setup)
            runs.append(run_setup(model, setup))
    return runs


def texts_by_setup(runs: Sequence[SetupRun]) -> dict[str, list[str]]:
    """Each different text to the setups that wrote it, in order of appearance."""
    grouped: dict[str, list[str]] = {}
    for run in runs:
        grouped.setdefault(run.text, []).append(run.row.setup)
    return grouped


def generation_table(rows: Sequence[GenerationRow]) -> Table:
    """The rows as a table. Speedup is in wall time per output token, over the first row."""
    first = rows[0]
    return Table(
        ["setup", "TTFT ms", "ITL ms", "TPOT ms", "tok/s", "peak MiB", "weights MiB", "speedup"],
        [_cells(row, first) for row in rows],
        title=f"baseline-generate: {first.prompt_tokens} prompt tokens, up to {MAX_TOKENS} output tokens",
        note=f"speedup: over {first.setup}, wall time per output token",
    )


def _cells(row: GenerationRow, first: GenerationRow) -> list[str]:
    gaps = ["-" if gap is None else f"{gap:.1f}" for gap in (row.itl_ms, row.tpot_ms)]
    memory = [f"{gib * 1024:.0f}" for gib in (row.peak_mem_gib, row.weights_gib)]
    return [row.setup, f"{row.ttft_ms:.1f}", *gaps, f"{row.tok_s:.1f}", *memory, f"{row.tok_s / first.tok_s:.2f}x"]


def serve_options() -> list[str]:
    """Flags of `vllm serve`. On the CPU the model runs eagerly: compiling would take longer than the whole demo."""
    import torch

    options = ["--quantization", "rowint8", "--max-model-len", str(MAX_MODEL_LEN)]
    return options if torch.cuda.is_available() else [*options, "--enforce-eager"]


def complete_with_vllm(model: Path) -> str:
    """Starts `vllm serve` with rowint8, asks PROMPT through the OpenAI client, stops the server; returns the answer.

    Raises:
        EvalError: vLLM is not installed or its server failed.
    """
    from openai import OpenAI

    with vllm_server(model, serve_options()) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        completion = client.chat.completions.create(
            model=str(model),
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
    return completion.choices[0].message.content or ""
