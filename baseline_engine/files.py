"""Reading the files of a model folder, which may be anything: a pipe, no text, JSON of another shape."""

import json
import os
from pathlib import Path
from typing import Any

from rowint8.baseline_engine.errors import EngineError, one_line

_MAX_JSON_BYTES = 1 << 26


def require_file(path: Path) -> Path:
    """The path again; EngineError where it is missing, forbidden or no regular file (a pipe may never end)."""
    try:
        if path.is_file():
            if not os.access(path, os.R_OK):  # safetensors says that it is not there
                raise EngineError(f"{path} cannot be read: Permission denied")
            return path
        there = path.exists()
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror or error}") from error
    what = "is no regular file; copy the file itself there" if there else "is missing; fetch the model again"
    raise EngineError(f"{path} {what}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; EngineError where there is none."""
    require_file(path)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise EngineError(f"{path} has more than {_MAX_JSON_BYTES >> 20} MiB, which no such file has")
        content = json.loads(path.read_text(encoding="utf-8"))
    except EngineError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content
