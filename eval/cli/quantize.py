"""The command `rowint8 quantize`."""

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rowint8.baseline_engine.progress import progress_bar
from rowint8.eval.cli.output import answer, say
from rowint8.eval.errors import EvalError

if TYPE_CHECKING:
    from rowint8.eval.quantize.checkpoint import Convert
    from rowint8.eval.quantize.source import Source


class Format(StrEnum):
    rowint8 = "rowint8"
    compressed_tensors = "compressed-tensors"


class Method(StrEnum):
    rtn = "rtn"
    gptq = "gptq"


class Activations(StrEnum):
    int8 = "int8"


Model = Annotated[str, typer.Argument(help="A folder with safetensors in fp32, bf16 or fp16, or a hub name.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")]
Form = Annotated[
    Format,
    typer.Option(
        "--format", help="rowint8: for this plugin and the small engine; compressed-tensors: for vLLM without it."
    ),
]
Ignore = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help='A layer to leave as it is: its full name, or "re:" and a pattern. Repeat for more.'),
]
Rounding = Annotated[Method, typer.Option(help="rtn: round to nearest. gptq: round for a text, which takes minutes.")]
Calibration = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="The text for gptq, 16,384 tokens or more: a text file, or .jsonl with the fields page or text."),
]
ForActivations = Annotated[
    Optional[Activations],  # noqa: UP045
    typer.Option(help="int8: rotate the rows, which engines then multiply by tokens rounded to INT8; format rowint8."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model.")
]


def quantize(
    model: Model,
    target: Out,
    form: Form = Format.rowint8,
    ignore: Ignore = None,
    method: Rounding = Method.rtn,
    calibration: Calibration = None,
    activations: ForActivations = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a checkpoint whose linear layers are INT8, one file of the source at a time.

    Example: rowint8 quantize models/smollm2-135m-instruct models/smollm2-rowint8

    Example: rowint8 quantize MODEL OUT --method gptq --calibration book.txt
    """
    if (method is Method.gptq) != (calibration is not None):
        raise EvalError("--method gptq and --calibration TEXT need each other; --method rtn takes neither")
    if activations and form is not Format.rowint8:
        raise EvalError(f"--activations int8 rotates rows, which {form.value} does not know; give --format rowint8")
    from rowint8.eval.quantize import checkpoint as job
    from rowint8.eval.quantize.folder import refuse_existing
    from rowint8.eval.quantize.layers import ignored_layers
    from rowint8.eval.quantize.source import open_source, source_folder
    from rowint8.kernels.activations import LARGEST_BLOCK

    rotation = LARGEST_BLOCK if activations else None
    refuse_existing(target)
    source = open_source(source_folder(model), trust_remote_code)
    ignored = ignored_layers(source.layers, ignore or ())
    rounded = source.layers - ignored
    nearest = job.round_to_nearest(rounded, rotation)
    convert = _calibrated(source, rounded, calibration, rotation) if calibration else nearest
    with progress_bar("quantizing", source.num_tensors, show=True) as advance:
        written = job.write_checkpoint(source, target, form.value, ignored, convert, advance, rotation)
    answer(
        f"{target}: {written.int8_layers} linear layers in INT8, "
        f"{written.source_bytes / 2**20:.0f} -> {written.written_bytes / 2**20:.0f} MiB"
    )
    if source.other_layers:
        kinds = sorted({layer.rpartition(".")[2] for layer in source.other_layers})
        say(
            f"{len(source.other_layers)} linear layers stay as they are, for vLLM may not take them: {', '.join(kinds)}"
        )


def _calibrated(source: "Source", layers: Collection[str], text: Path, rotation: int | None) -> "Convert":
    from rowint8.eval.quantize import gptq
    from rowint8.eval.quantize.text import read_text, token_windows

    windows = token_windows(
        source.folder, read_text(text), gptq.WINDOW, gptq.WINDOWS, trust_remote_code=source.trust_remote_code
    )
    if len(windows) < gptq.WINDOWS:
        needed = gptq.WINDOW * gptq.WINDOWS
        raise EvalError(f"{text} has fewer than {needed} tokens, and from less gptq learns the text, not the language")
    with progress_bar("calibrating", len(layers), show=True) as advance:
        return gptq.calibrate(source, layers, windows, advance, rotation)
