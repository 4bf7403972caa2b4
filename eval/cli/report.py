"""The command `rowint8 report`."""

from pathlib import Path
from typing import Annotated

import typer

from rowint8.eval.cli.output import say


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of result files.")] = Path("results"),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Also draw the plots, as SVG.")] = True,
    mixed: Annotated[bool, typer.Option("--mixed", help="Also of files that different code has measured.")] = False,
) -> None:
    """Write REPORT.md and plots from result files, and the generated parts of the documents beside them.

    Nothing is measured. Values that cannot be true stop the report, and so do files of different code.

    Example: rowint8 report results
    """
    from rowint8.eval.plots import pictures
    from rowint8.eval.report import document as job
    from rowint8.eval.writing import write_file

    found = job.read_folder(folder)
    if not mixed:
        job.refuse_mixed(found)
    texts = job.documents(folder, found)
    drawn = {folder / name: draw for name, draw in pictures(found).items()} if plots else {}
    for path, draw in drawn.items():
        draw(path)
    for path, text in texts.items():
        write_file(path, text)
    say(f"wrote {', '.join(map(str, (*texts, *drawn)))}")
