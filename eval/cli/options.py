"""Options of the commands that time whole engines: which model, on which shape of random weights."""

from pathlib import Path
from typing import Annotated, Optional

import typer

Model = Annotated[Optional[Path], typer.Option(help="A model folder, instead of random weights.")]  # noqa: UP045
Config = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Shape of the random weights: llama-3.1-8b, llama-3.1-70b, tiny, or the path of a config.json. "
        "Default: llama-3.1-8b."
    ),
]
Layers = Annotated[Optional[int], typer.Option(min=1, help="Depth of the random weights, instead of all.")]  # noqa: UP045
