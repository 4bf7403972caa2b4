"""Where the commands of `rowint8` write: results to stdout, the rest to stderr, and a result file where asked."""

import io
import os
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console, RenderableType

from rowint8.eval.errors import EvalError
from rowint8.eval.writing import refuse_other_content, refuse_unwritable

if TYPE_CHECKING:
    from rowint8.eval.results.files import Results
    from rowint8.eval.results.schema import Ceilings

out = Console()
err = Console(stderr=True)

BUSY_PERCENT = 20.0


def _json_target(path: Path | None) -> Path | None:
    if path is not None:
        refuse_unwritable(path)
        refuse_other_content(path, b'{"environment":{')
    return path


Json = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", callback=_json_target, help="Also write the results to this file."),
]
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
    """Warns of other programs that keep the CPU busy, which takes a second to see: timings would suffer."""
    import psutil

    busy = psutil.cpu_percent(1.0)
    if busy >= BUSY_PERCENT:
        what = f"other programs keep {busy:.0f}% of the CPU busy: times measured now say little; stop them first"
        err.print(f"[yellow]warning:[/yellow] {what}", highlight=False)


def write(path: Path | None, rows, ceilings=None) -> None:
    """Writes a result file and says so; nothing without a path."""
    if path is not None:
        save(path, rows, ceilings)
        say(f"wrote {path}")


def save(path: Path, rows, ceilings=None, command: str | None = None, cut: Sequence[str] = ()) -> None:
    """Writes a result file whose command is this process's command line, unless another is given."""
    from rowint8.eval.results.environment import describe_environment
    from rowint8.eval.results.files import Results, write_results

    given: dict[str, Any] = {"command": command or _command_line(path), "rows": tuple(rows), "cut": tuple(cut)}
    write_results(path, Results(environment=describe_environment(), ceilings=ceilings, **given))


def _command_line(path: Path) -> str:
    """This process's, with the result file at `path`."""
    from rowint8.eval.results.files import told_command

    return told_command(sys.argv[1:], path)


class Kept:
    """The rows of a benchmark, and the file that holds them whenever the benchmark may end.

    Several processes may append to one file at the same time, each with rows of its own, such as one a GPU. The file
    names the commands that have not come to their end (`Results.cut`).

    Args:
        path: of the file; None writes nothing.
        row_type: of its rows.
        append: keep the rows that the file has, but those whose key is added, which take their place.
        key: what rows that are measured together share.
        every_s: rows that come sooner after the last writing wait for the next, or for `close`. A `with` block closes.

    Raises:
        EvalError: the file to append to cannot be read, or comes from another machine or other versions.
    """

    def __init__(
        self,
        path: Path | None,
        row_type: type,
        append: bool,
        key: Callable[[Any], Hashable] = lambda row: row.setup,
        every_s: float = 0.0,
    ) -> None:
        self.path, self.rows = path, []
        self.ceilings: Ceilings | None = None
        self._key, self._every_s, self._append = key, every_s, append
        self._added: list = []
        self._unwritten = self._ended = False
        self._written_at: float | None = None
        if append:
            if path is None:
                raise EvalError("--append keeps the rows of a file; name it with --json")
            self._check(path, row_type)

    def _check(self, path: Path, row_type: type) -> None:
        from rowint8.eval.results.environment import describe_environment

        earlier = self._earlier()
        if earlier is None:
            return
        if not isinstance(earlier.rows[0], row_type):
            raise EvalError(f"{path} holds rows of kind {earlier.rows[0].kind}, which this command does not write")
        if changed := earlier.environment.differences(describe_environment()):
            raise EvalError(f"{path} was measured elsewhere, so nothing is appended: {changed}")

    def _earlier(self) -> "Results | None":
        """What the file holds now; None where nothing is kept of it or there is none."""
        from rowint8.eval.results.files import read_results

        return read_results(self.path) if self._append and self.path is not None and self.path.exists() else None

    def add(self, rows: Collection) -> None:
        """Adds rows, and writes the file anew once it is time."""
        self._added += rows
        self._unwritten |= bool(rows)
        if self._written_at is None or time.monotonic() - self._written_at >= self._every_s:
            self._write()

    def _write(self) -> None:
        with _alone(self.path) if self._append and self.path else nullcontext():
            earlier = self._earlier()
            self.rows = self._merged(earlier.rows if earlier else ())
            if self.path is not None and self._unwritten:
                ceilings = self.ceilings or (earlier.ceilings if earlier else None)
                save(self.path, self.rows, ceilings, self._command(self.path, earlier), self._cut(self.path, earlier))
                self._unwritten, self._written_at = False, time.monotonic()

    def _command(self, path: Path, earlier: "Results | None") -> str:
        if earlier is None:
            return _command_line(path)
        ours_is_there = self._written_at is not None
        return earlier.command if ours_is_there else f"{earlier.command} && {_command_line(path)}"

    def _cut(self, path: Path, earlier: "Results | None") -> list[str]:
        ours = _command_line(path)
        others = [command for command in (earlier.cut if earlier else ()) if command != ours]
        return others if self._ended else [*others, ours]

    def _merged(self, earlier: Sequence) -> list:
        replaced = {self._key(row) for row in self._added}
        places = {key: place for place, key in enumerate(dict.fromkeys(map(self._key, earlier)))}
        kept = [row for row in earlier if self._key(row) not in replaced]
        return sorted([*kept, *self._added], key=lambda row: places.get(self._key(row), len(places)))

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

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(ended=kind is None)

    def close(self, ended: bool) -> None:
        """Writes what waits, and whether all was measured; says where the rows are."""
        self._ended = ended
        self._unwritten = bool(self._added)
        self._write()
        if self.path is not None and self._added:
            say(f"wrote {self.path}")

    def finish(self, failed: Sequence[str], *tables: Callable[[Sequence], RenderableType]) -> None:
        """Prints the rows in these forms and closes.

        Raises:
            EvalError: setups failed.
        """
        for table in tables if self.rows else ():
            out.print(table(self.rows))
        self.close(ended=not failed)
        if failed:
            raise EvalError(f"failed: {', '.join(failed)}; why is said above")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process of this machine at a time, of any user, read, change and write a file: its folder is locked."""
    import fcntl

    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
