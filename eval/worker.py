"""The other side of `processes.run_worker`: `python -m rowint8.eval.worker MODULE:FUNCTION RESULT < REQUEST`.

REQUEST is a JSON object of the function's arguments; the file RESULT receives what it returns, as JSON. A file, because
engines and their own processes write to stdout.
"""

import importlib
import json
import sys
from pathlib import Path


def serve(function: str, result: str) -> None:
    """Calls the function once."""
    module, _, name = function.partition(":")
    answer = getattr(importlib.import_module(module), name)(**json.load(sys.stdin))
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    serve(*sys.argv[1:])
