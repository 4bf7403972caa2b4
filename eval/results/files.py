"""The form of every result file: where it was measured, by which command, and rows of one kind.

    {"environment": {...}, "command": "rowint8 demo --json out.json", "rows": [{"kind": "generation", ...}, ...]}

Reading a file checks all of it against `schema`: unknown and missing keys, wrong types, NaN and values out of range are
errors that name the place.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from rowint8.eval.errors import EvalError
from rowint8.eval.results.schema import CHECKED, Ceilings, Count, Name, Row
from rowint8.eval.writing import write_file


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Environment:
    """What a measurement depends on besides the code. None: not installed, not there, or not known."""

    date: Name
    """UTC, ISO 8601, to the second."""
    device: Name
    """The GPU's name, or the CPU's model."""
    driver: Name | None
    """NVIDIA driver version; None on the CPU."""
    os: Name
    threads: Count
    """torch's CPU threads."""
    python: Name
    rowint8: Name
    torch: Name
    triton: Name | None
    transformers: Name | None
    vllm: Name | None
    git_commit: Name | None
    """The code that measured; None where it runs without git and without a stamp (`make stamp`)."""
    git_dirty: bool | None
    """Whether tracked files differ from that commit."""
    code: Annotated[Name | None, Field(exclude_if=lambda value: value is None)] = None
    """Hash of the code that measures (`environment.code_hash`); absent from older files."""

    def differences(self, other: "Environment") -> str:
        """What differs, but for the date; of the code its hash, or the commit where one has none."""
        same_code = {"date", "git_commit", "git_dirty"} if self.code and other.code else {"date", "code"}
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return ", ".join(f"{key} {a} and {b}" for (key, a), b in pairs if a != b and key not in same_code)


Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Results(Generic[Kind]):
    """A result file."""

    environment: Environment
    command: Name
    rows: tuple[Kind, ...]
    """At least one, all of one kind."""
    ceilings: Annotated[Ceilings | None, Field(exclude_if=lambda value: value is None)] = None
    """With kernel rows; absent from other files."""
    cut: Annotated[tuple[Name, ...], Field(exclude_if=lambda value: not value)] = ()
    """Those of the commands that have not come to their end, or of which a part failed."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Results[Kind]":
        kinds = list(dict.fromkeys(type(row).__name__ for row in self.rows))
        if len(kinds) != 1:
            raise ValueError(f"rows are of several kinds: {', '.join(kinds)}" if kinds else "rows is empty")
        return self


def told_command(arguments: Sequence[str], path: Path) -> str:
    """The command line `rowint8 ARGUMENTS` for the result file at `path`.

    Where the file, or what lies outside the working directory, is on this machine is no part of the measurement: only
    their names are kept.
    """
    command = shlex.join(["rowint8", *(_without_place(part, path) for part in arguments)])
    return command.encode(errors="backslashreplace").decode()  # an argument may be no UTF-8


def _without_place(argument: str, file: Path) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    outside = os.path.isabs(value) or value.startswith("..")
    return option + equals + (Path(value).name if outside or value == str(file) else value)


def write_results(path: Path, results: Results) -> None:
    """Writes `results` as JSON.

    Raises:
        EvalError: `write_file` cannot.
    """
    write_file(path, _adapter().dump_json(results, indent=2) + b"\n")


def in_one_line(results: Results) -> str:
    """A result file's content in one line of JSON."""
    return _adapter().dump_json(results).decode()


def read_results(path: Path) -> Results[Any]:
    """Reads a result file of any kind.

    Raises:
        EvalError: the file cannot be read, or is not of this form; the message names the first wrong place.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise EvalError(f"cannot read {path}: it is no regular file")
        content = path.read_bytes()
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from None
    return parse_results(content, str(path))


def parse_results(content: bytes | str, name: str) -> Results[Any]:
    """The content of a result file.

    Raises:
        EvalError: it is not of this form; the message names `name` and the first wrong place.
    """
    try:
        return _adapter().validate_json(content)
    except ValidationError as error:
        raise EvalError(f"{name}: {_first_problem(error)}") from None


@cache
def _adapter() -> TypeAdapter[Results[Any]]:
    return TypeAdapter(Results[Row])


def _first_problem(error: ValidationError) -> str:
    """Such as "rows.3.ttft_ms: Input should be greater than 0 (given: -1.0; 2 more problems)"."""
    first = error.errors(include_url=False, include_context=False)[0]
    location = first["loc"]
    if location[:1] == ("rows",):
        location = location[:2] + location[3:]  # the third is the row's kind
    place = ".".join(str(part) for part in location) or "the file"
    given = repr(first["input"])
    shown = given if len(given) <= 60 else given[:57] + "..."
    more = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{place}: {' '.join(first['msg'].split())} (given: {shown}{more})"
