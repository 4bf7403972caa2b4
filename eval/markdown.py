"""Markdown pieces, and documents with generated parts between `<!-- report:NAME -->` and `<!-- /report -->`."""

import re
from collections.abc import Iterable, Mapping, Sequence

from rowint8.eval.errors import EvalError

TBD = "TBD"
"""In place of what is not measured."""
_PART = re.compile(r"(<!-- report:(\S+) -->\n).*?(<!-- /report -->)", re.DOTALL)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line break at its end; bars in cells are escaped."""
    lines = [heading, ["---"] * len(heading), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | None, digits: int) -> str:
    return TBD if value is None else f"{value:.{digits}f}"


def folded(title: str, text: str) -> str:
    """A part that a click opens."""
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def fill(text: str, parts: Mapping[str, str], name: str) -> str:
    """The document with its generated parts replaced; the rest stays as it is.

    Args:
        parts: marker name to Markdown.
        name: of the document, for the message.

    Raises:
        EvalError: a marker has no part, or is not closed.
    """
    if text.count("<!-- report:") != len(_PART.findall(text)):
        raise EvalError(
            f"{name}: a `<!-- report:NAME -->` has no `<!-- /report -->`; each needs one, on lines of their own"
        )
    if unknown := [found for _, found, _ in _PART.findall(text) if found not in parts]:
        raise EvalError(f"{name} asks for report:{unknown[0]}; accepted are {', '.join(parts)}")
    return _PART.sub(lambda match: f"{match[1]}{parts[match[2]].strip()}\n{match[3]}", text)
