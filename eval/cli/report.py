"""The command `rowint8 report`."""

from pathlib import Path
from typing import Annotated

import typer

from rowint8.eval.cli.output import err
from rowint8.eval.errors import EvalError


def report(
    folder: Annotated[Path, typer.Argument(help="Of result files.")] = Path("results"),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Also draw the plots, as SVG.")] = True,
) -> None:
    """Write REPORT.md and plots from result files, and the generated parts of the documents beside them.

    Nothing is measured; what has no result is printed as TBD. Values that cannot be true stop the report.

    Example: rowint8 report results
    """
    from rowint8.eval.plots import pictures
    from rowint8.eval.report import document as job

    found = job.read_folder(folder)
    texts = job.documents(folder, found)
    drawn = {folder / name: draw for name, draw in pictures(found).items()} if plots else {}
    for path, draw in drawn.items():
        draw(path)
    for path, text in texts.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise EvalError(f"cannot write {path}: {error.strerror}") from None
    err.print(f"wrote {', '.join(str(path) for path in (*texts, *drawn))}", highlight=False, soft_wrap=True)
