"""The other side of `processes.run_worker`: `python -m rowint8.eval.worker MODULE:FUNCTION REQUEST RESULT`.

The file REQUEST holds the function's arguments as a JSON object; the file RESULT receives what it returns, or
{"refused": why}, as JSON. Not stdout, which engines and their own processes write to.
"""

import importlib
import json
import sys
from pathlib import Path

from rowint8.baseline_engine.errors import EngineError
from rowint8.eval.errors import EvalError


def serve(function: str, request: str, result: str) -> None:
    """Calls the function once. What the user can put right is an answer too."""
    module, _, name = function.partition(":")
    try:
        answer = getattr(importlib.import_module(module), name)(**json.loads(Path(request).read_text()))
    except (EngineError, EvalError) as error:
        answer = {"refused": str(error)}
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    serve(*sys.argv[1:])
