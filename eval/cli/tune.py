"""The command `rowint8 tune`."""

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from rowint8.eval.cli.output import Json, err, out, write
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import SHAPES, TOKENS, parse_tokens, select_shapes
from rowint8.eval.models import DEFAULT_MODEL

_COMPILING = 0.5
"""Of the time, at most this part is for compiling ahead."""


def tune(
    shapes: Annotated[
        str,
        typer.Option(help=f"Comma-separated: {', '.join(name for name in SHAPES if '/' not in name)}; or MODEL/qkv."),
    ] = DEFAULT_MODEL,
    model: Annotated[Optional[Path], typer.Option(help="Instead the shapes of this model folder, on one GPU.")] = None,  # noqa: UP045
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Comma-separated: a tile is chosen up to each of them. Default: 1 to 8192 in powers of two."),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Stop after about this time; what is chosen by then counts.")
    ] = 10,
    tiles: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="The file to write. Default: $ROWINT8_TILES or ~/.config/rowint8/tiles.json."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Find the fastest kernel tiles on this CUDA GPU, for a card that the shipped ones were not measured on.

    They are taken from then on wherever rowint8 runs as this user: in both engines and in `rowint8 bench kernels`.

    Example: rowint8 tune --model models/smollm2-135m-instruct --minutes 5
    """
    import torch

    from rowint8.baseline_engine.progress import progress_bar
    from rowint8.eval.kernels import tune as job
    from rowint8.kernels.tiles.user import read_tiles, tiles_file, write_tiles

    chosen = job.model_shapes(model) if model else select_shapes(shapes)
    counts = parse_tokens(tokens) if tokens else TOKENS
    if not torch.cuda.is_available():
        raise EvalError("tiles are timed on a CUDA GPU; torch finds none here")
    start, seconds, device = time.monotonic(), 60 * minutes, torch.device("cuda")
    path, card = tiles or tiles_file(), torch.cuda.get_device_name()
    try:
        found = read_tiles(path, card) if path.exists() else {}
    except ValueError as error:
        raise EvalError(str(error)) from None
    jobs = job.make_jobs(chosen, counts, device)
    if not jobs:
        raise EvalError(f"--shapes is {shapes}, which has no linear layer; accepted are names such as gate_up")
    wanted = job.compilations(jobs)
    with progress_bar("compiling", len(wanted), show=True) as advance:
        job.compile_ahead(wanted, _COMPILING * seconds, advance)
    choices = []
    with progress_bar("timing", len(jobs), show=True) as advance:
        for choice in job.choose_tiles(jobs, seconds - (time.monotonic() - start), device):
            choices.append(choice)
            found.setdefault((choice.row.op, choice.row.N, choice.row.K), {})[choice.row.M] = choice.tile
            write_tiles(path, card, found)
            advance()
    if not choices:
        raise EvalError(f"--minutes {minutes:g} was too short for a first choice; give more, or fewer --shapes")
    out.print(job.tune_table(choices, card))
    err.print(f"wrote {path}", highlight=False)
    if len(choices) < len(jobs):
        missing = f"{len(jobs) - len(choices)} of {len(jobs)} choices are missing"
        err.print(f"[yellow]the time is over:[/yellow] {missing}; give more --minutes", highlight=False)
    write(json_file, [choice.row for choice in choices])
