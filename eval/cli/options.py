"""Options that several commands share: which model, on which shape of random weights, how it is run."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from rowint8.eval.engines.setups import MOST
from rowint8.eval.models import DEFAULT_MODEL, MODELS

Model = Annotated[Optional[Path], typer.Option(help="A model folder, instead of random weights.")]  # noqa: UP045
Config = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help=f"Shape of the random weights: {', '.join(MODELS)}, or the path of a config.json. "
        f"Default: {DEFAULT_MODEL}."
    ),
]
Layers = Annotated[Optional[int], typer.Option(min=1, max=MOST, help="Depth of the random weights, instead of all.")]  # noqa: UP045
Workloads = Annotated[str, typer.Option(help="Comma-separated BATCHxPROMPTxOUTPUT, in tokens.")]
Repeats = Annotated[int, typer.Option(min=1, max=1000, help="Measured runs of a workload; medians count.")]
Sequences = Annotated[
    int,
    typer.Option(min=0, max=8192, help="Requests of the throughput workload, 100 to 1024 tokens in and out."),
]
TensorParallelSize = Annotated[int, typer.Option(min=1, max=1024, help="GPUs that a model is split over.")]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="No compilation, no CUDA graphs: a quick trial.")]
ExpertParallel = Annotated[
    bool, typer.Option("--enable-expert-parallel", help="Give each GPU whole experts, instead of a part of each.")
]
