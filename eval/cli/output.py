"""Where the commands of `rowint8` write: results to stdout, the rest to stderr, and a result file where asked."""

import io
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer
from rich.console import Console, RenderableType

from rowint8.eval.errors import EvalError

if TYPE_CHECKING:
    from rowint8.eval.results.files import Environment

out = Console()
err = Console(stderr=True)

Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the results to this file.")]  # noqa: UP045
Append = Annotated[
    bool, typer.Option("--append", help="Keep what the file holds of other setups, measured on the same machine.")
]


def say(line: str) -> None:
    """A line for people, as it is."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def answer(line: str) -> None:
    """A line of results, as it is."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def ready_streams() -> None:
    """Lets every later line be written: what is closed goes nowhere, and what an encoding lacks is written as escapes.

    A closed descriptor would be taken by the next file that is opened, and what a library prints would end up there.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(reason: str) -> NoReturn:
    """Ends the program with one line and exit status 1."""
    say(f"rowint8: {reason}")
    try:
        sys.stdout.flush()
    except OSError:  # a full disk: Python would try once more, and end with a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(1)


def warn_if_busy() -> None:
    """Says so where other programs keep this machine busy, which takes a second to see: timings would suffer."""
    from rowint8.eval.console import busy_warning

    if warning := busy_warning():
        err.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def write(path: Path | None, rows, ceilings=None) -> None:
    """Writes a result file and says so; nothing without a path."""
    if path is not None:
        save(path, rows, ceilings)
        say(f"wrote {path}")


def save(path: Path, rows, ceilings=None, after: str = "") -> None:
    """Writes a result file whose command is this process's command line, behind those that it comes `after`.

    Where the file, or what lies outside the working directory, is on this machine is no part of the measurement: only
    their names are kept.
    """
    from rowint8.eval.results.environment import describe_environment
    from rowint8.eval.results.files import Results, write_results

    command = shlex.join(["rowint8", *(_without_place(part, path) for part in sys.argv[1:])])
    command = command.encode(errors="backslashreplace").decode()  # an argument may be no UTF-8
    command = f"{after} && {command}" if after else command
    results = Results(environment=describe_environment(), command=command, rows=tuple(rows), ceilings=ceilings)
    write_results(path, results)


def _without_place(argument: str, file: Path) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    outside = os.path.isabs(value) or value.startswith("..")
    return option + equals + (Path(value).name if outside or value == str(file) else value)


class Kept:
    """The rows of a benchmark of several setups, and the file that holds them whenever the benchmark may end.

    Args:
        path: of the file; None writes nothing.
        row_type: of its rows, which have a `setup`.
        append: keep the rows that the file has, but those of setups that are added, which take their place.

    Raises:
        EvalError: the file to append to cannot be read, or comes from another machine or other versions.
    """

    def __init__(self, path: Path | None, row_type: type, append: bool) -> None:
        self.path, self.rows, self._after = path, [], ""
        self._earlier: Sequence = ()
        self._added: list = []
        if append:
            if path is None:
                raise EvalError("--append keeps the rows of a file; name it with --json")
            self._read(path, row_type)

    def _read(self, path: Path, row_type: type) -> None:
        from rowint8.eval.results.environment import describe_environment
        from rowint8.eval.results.files import read_results

        earlier = read_results(path)
        if not isinstance(earlier.rows[0], row_type):
            raise EvalError(f"{path} holds rows of kind {earlier.rows[0].kind}, which this command does not write")
        if changed := _differences(earlier.environment, describe_environment()):
            raise EvalError(f"{path} was measured elsewhere, so nothing is appended: {changed}")
        self._earlier, self._after = earlier.rows, earlier.command

    def add(self, rows: Collection) -> None:
        """Adds rows and writes the file anew."""
        self._added += rows
        replaced = {row.setup for row in self._added}
        places = {setup: place for place, setup in enumerate(dict.fromkeys(row.setup for row in self._earlier))}
        kept = [row for row in self._earlier if row.setup not in replaced]
        self.rows = sorted([*kept, *self._added], key=lambda row: places.get(row.setup, len(places)))
        if self.path is not None and rows:
            save(self.path, self.rows, after=self._after)

    def measure(self, setups: Sequence[str], run: Callable[[str], Iterable]) -> list[str]:
        """Adds the rows of each setup as they come; the setups that failed, and why is said."""
        failed = []
        for number, name in enumerate(setups, 1):
            try:
                with err.status(f"{name} ({number} of {len(setups)})"):
                    for row in run(name):
                        self.add([row])
            except EvalError as error:
                failed.append(name)
                say(f"{name}: {error}")
        return failed

    def close(self) -> None:
        """Says where the rows are."""
        if self.path is not None and self.rows:
            say(f"wrote {self.path}")

    def finish(self, failed: Sequence[str], *tables: Callable[[Sequence], RenderableType]) -> None:
        """Prints the rows in these forms and closes.

        Raises:
            EvalError: setups failed.
        """
        for table in tables if self.rows else ():
            out.print(table(self.rows))
        self.close()
        if failed:
            raise EvalError(f"failed: {', '.join(failed)}; why is said above")


def _differences(one: "Environment", other: "Environment") -> str:
    """What differs, but for the date."""
    pairs = zip(asdict(one).items(), asdict(other).values(), strict=True)
    return ", ".join(f"{key} {a} and {b}" for (key, a), b in pairs if a != b and key != "date")
