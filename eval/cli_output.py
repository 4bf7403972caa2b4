"""Where the commands of `rowint8` write: results to stdout, the rest to stderr, and a result file where asked."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the results to this file.")]  # noqa: UP045


def write(path: Path | None, rows, ceilings=None) -> None:
    """Writes a result file and says so; nothing without a path."""
    if path is not None:
        save(path, rows, ceilings)
        err.print(f"wrote {path}", highlight=False)


def save(path: Path, rows, ceilings=None) -> None:
    """Writes a result file whose command is this process's command line.

    The file's own place is no part of the measurement: only its name is kept.
    """
    from rowint8.eval.environment import describe_environment
    from rowint8.eval.schema import Results, write_results

    command = shlex.join(["rowint8", *(path.name if part == str(path) else part for part in sys.argv[1:])])
    results = Results(environment=describe_environment(), command=command, rows=tuple(rows), ceilings=ceilings)
    write_results(path, results)
