"""Options of the commands that time whole engines: which model, on which shape of random weights."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from rowint8.eval.models import DEFAULT_MODEL, MODELS

Model = Annotated[Optional[Path], typer.Option(help="A model folder, instead of random weights.")]  # noqa: UP045
Config = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help=f"Shape of the random weights: {', '.join(MODELS)}, or the path of a config.json. "
        f"Default: {DEFAULT_MODEL}."
    ),
]
Layers = Annotated[Optional[int], typer.Option(min=1, help="Depth of the random weights, instead of all.")]  # noqa: UP045
