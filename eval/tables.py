"""A table, described once: Markdown for the documents, and rich for a console of 80 columns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import rich.table
from rich import box
from rich.markup import escape

from rowint8.eval import markdown
from rowint8.eval.models import DEFAULT_MODEL

_MODEL_OPTIONS = re.compile(r"--(model|config|layers)[ =](\S+)")
_RANDOM_BY_DEFAULT = re.compile(r"rowint8 (bench|profile)\b")


def model_of(command: str) -> str:
    """What a command of `rowint8` measures: "random weights of Llama-3.1-8B's shape", or a model's name; without an
    option engines get the first and quality SmolLM2."""
    options = dict(_MODEL_OPTIONS.findall(command))
    if "model" in options or not _RANDOM_BY_DEFAULT.match(command):
        return _written(Path(options.get("model", "smollm2-135m-instruct")).name)
    layers = f" with {options['layers']} layers" if "layers" in options else ""
    return f"random weights of {_written(options.get('config', DEFAULT_MODEL))}'s shape{layers}"


def _written(name: str) -> str:
    """A model's name as its makers write it: sizes in capitals."""
    sized = re.sub(r"\d[bm]\b|\ba\d+b\b", lambda size: size[0].upper(), name)
    known = sized.replace("smollm2", "SmolLM2").replace("-instruct", "-Instruct")
    return known[:1].upper() + known[1:]


class Column(NamedTuple):
    """A column with another heading on the console than in documents; one without a heading is left out there."""

    heading: str
    short: str


@dataclass(frozen=True)
class Table:
    """What a table says, for both renderings."""

    columns: Sequence[Column | str]
    """Headings; a plain one serves both renderings."""
    lines: Sequence[Sequence[str]]
    """A cell for each column."""
    title: str = ""
    """Title and note are for the console: documents have them in their text."""
    note: str = ""
    words: int = 1
    """The first columns on the console, which hold words. The others hold numbers."""
    grouped: bool = False
    """Whether lines on the console stand together while their first cell is the same or empty."""

    def markdown(self) -> str:
        """The table with a line break at its end."""
        shown = self._shown([column if isinstance(column, str) else column.heading for column in self.columns])
        return markdown.table(shown[0], shown[1:])

    def __rich__(self) -> rich.table.Table:
        """What a rich console prints. Numbers are right-aligned; a cell of several is never broken over lines."""
        headings, *lines = self._shown([column if isinstance(column, str) else column.short for column in self.columns])
        table = rich.table.Table(title=escape(self.title), caption=escape(self.note), box=box.SIMPLE_HEAD, padding=0)
        for index, heading in enumerate(headings):
            if index < self.words:
                table.add_column(heading, overflow="fold")
            else:
                table.add_column(heading, justify="right", no_wrap=any(" " in line[index] for line in lines))
        for line, after in zip(lines, [*lines[1:], None], strict=True):
            ends = self.grouped and after is not None and after[0] not in ("", line[0])
            table.add_row(*map(escape, line), end_section=ends)
        return table

    def _shown(self, headings: list[str]) -> list[list[str]]:
        """The headings and lines without the columns that have no heading."""
        return [[cell for cell, kept in zip(line, headings, strict=True) if kept] for line in (headings, *self.lines)]
