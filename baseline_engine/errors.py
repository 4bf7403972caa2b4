"""The exceptions that are meant for people."""

from typing import Any


class EngineError(ValueError):
    """Something the user can put right. The message is one line: what was given, what is accepted, what to do."""


class SettingError(EngineError):
    """A setting (a sampling parameter, an engine option) outside what is accepted."""


def describe(error: Any) -> str:
    """One line for a pydantic ValidationError: the fields that are missing, or the first whose value is refused."""
    faults = error.errors(include_url=False)
    missing = [".".join(map(str, fault["loc"])) for fault in faults if fault["type"] == "missing"]
    if missing:
        return f"missing {', '.join(missing)}"
    first, place = faults[0], faults[0]["loc"][0]
    index = "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    given = f"{place}{index} is {shown(first['input'])}; "
    if first["type"] == "extra_forbidden":
        return f"{given}the engine has no such setting"
    # A field of several types has an error for each.
    messages = [fault["msg"].removeprefix("Input should be ") for fault in faults if fault["loc"][0] == place]
    should = "it should be " if first["msg"].startswith("Input") else ""
    return one_line(given + should + " or ".join(dict.fromkeys(messages)))


def shown(value: Any) -> str:
    """A value as it stands in a message: at most 80 characters of its repr."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python writes, or a fault of the object
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(message: object) -> str:
    """The message without line ends, at most 300 characters; an exception without one gives its type."""
    text = " ".join(str(message).split()) or type(message).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
