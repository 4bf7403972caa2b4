"""The entry point of `rowint8`: what a Ctrl-C does outside of a command, above all while libraries load; then `app`."""

import os
import signal
import sys


def main() -> None:
    """Until there is something to clean up, an interrupt ends the process at once, with exit status 130."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from rowint8.eval.cli import app

    interrupted = []

    def interrupt(*_: object) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt if before is signal.default_int_handler else before)
    try:
        app.main()
    except KeyboardInterrupt:  # typer has its own way, once it runs a command
        sys.exit(130)
    except Exception:
        if not interrupted:
            raise
        sys.exit(130)  # a library that was interrupted while it loaded raised something else
