"""The form of every result file: where it was measured, by which command, and rows of one kind.

    {"environment": {...}, "command": "rowint8 demo --json out.json", "rows": [{...}, ...]}

Reading a file checks all of it against `schema`: unknown and missing keys, wrong types, NaN and values out of range are
errors that name the place.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from rowint8.eval.errors import EvalError
from rowint8.eval.results.schema import CHECKED, Ceilings, Count, Name


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
    transformers: Name
    vllm: Name | None
    git_commit: Name | None
    """Of the code that measured; None where it does not run from a git checkout."""
    git_dirty: bool | None
    """Whether tracked files differ from that commit."""


Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Results(Generic[Row]):
    """A result file."""

    environment: Environment
    command: Name
    rows: tuple[Row, ...]
    """At least one."""
    ceilings: Annotated[Ceilings | None, Field(exclude_if=lambda value: value is None)] = None
    """With kernel rows; absent from other files."""

    @model_validator(mode="after")
    def _not_empty(self) -> "Results[Row]":
        if not self.rows:
            raise ValueError("rows is empty")
        return self


def write_results(path: Path, results: Results[Row]) -> None:
    """Writes `results` as JSON; the file appears whole or not at all.

    Raises:
        EvalError: the folder cannot be written to.
    """
    text = _adapter(type(results.rows[0])).dump_json(results, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            whole = Path(scratch) / path.name
            whole.write_bytes(text + b"\n")
            os.replace(whole, path)
    except OSError as error:
        raise EvalError(f"cannot write {path}: {error.strerror}") from None


def read_results(path: Path, row_type: type[Row]) -> Results[Row]:
    """Reads a result file whose rows are of `row_type`.

    Raises:
        EvalError: the file cannot be read, or is not of this form; the message names the first wrong place.
    """
    try:
        return _adapter(row_type).validate_json(path.read_bytes())
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise EvalError(f"{path}: {_first_problem(error)}") from None


def _adapter(row_type: type) -> TypeAdapter[Any]:
    results: Any = Results  # type checkers know no type that is only known at run time
    return TypeAdapter(results[row_type])


def _first_problem(error: ValidationError) -> str:
    """Such as "rows.3.ttft_ms: Input should be greater than 0 (given: -1.0; 2 more problems)"."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    given = repr(first["input"])
    shown = given if len(given) <= 60 else given[:57] + "..."
    more = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{place}: {first['msg']} (given: {shown}{more})"
