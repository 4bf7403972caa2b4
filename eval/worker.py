"""The other side of `processes.run_worker`: `python -m rowint8.eval.worker MODULE:FUNCTION REQUEST RESULT`.

The file REQUEST holds the function's arguments as a JSON object; the file RESULT receives what it returns, as JSON. Not
stdout, which engines and their own processes write to.
"""

import importlib
import json
import sys
from pathlib import Path


def serve(function: str, request: str, result: str) -> None:
    """Calls the function once."""
    module, _, name = function.partition(":")
    answer = getattr(importlib.import_module(module), name)(**json.loads(Path(request).read_text()))
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    serve(*sys.argv[1:])
