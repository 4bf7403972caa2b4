"""The entry point of `baseline-generate`: what the process does about interrupts and its streams, then `command`.

It imports little before that is settled: a Ctrl-C while libraries load must not be lost in them.
"""

import os
import signal
import sys
from io import TextIOWrapper
from typing import Any

INTERRUPTED = b"baseline-generate: interrupted\n"


def main() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _exit_at_once)
    if sys.stderr is None:  # closed by whoever started this; print would write to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.exit("baseline-generate: error: stdout is closed; the text goes there: give it a file or a pipe")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows escapes
    from rowint8.baseline_engine.extras.command import app

    app()


def _exit_at_once(*_: Any) -> None:
    """There is nothing to save. An exception instead could come up in any callback, which would swallow it."""
    os.write(2, INTERRUPTED)
    os._exit(130)
