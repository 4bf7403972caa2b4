"""Writes a file whole or not at all, wherever its name leads."""

import os
import stat
import tempfile
from pathlib import Path

from rowint8.eval.errors import EvalError


def write_file(path: Path, content: bytes | str) -> None:
    """Writes `content` (text as UTF-8), and makes the folders above it.

    A file appears whole or not at all. One that exists keeps its mode, a new one has the umask's. A link stays: what it
    points to is written. A device, a pipe and the file that stdout or stderr goes to are written into.

    Raises:
        EvalError: it cannot be written, or the disk is full. A file is then as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if _is_stream(path):
            _append(path, data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise EvalError(f"cannot write {path}: {error.strerror}") from None


def refuse_unwritable(path: Path) -> None:
    """Raises EvalError where `write_file` is bound to fail: before hours of measuring, not after them."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise EvalError(f"cannot write {path}: it is a folder; name a file")
    except FileNotFoundError:
        above = next(folder for folder in Path(os.path.realpath(path)).parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise EvalError(f"cannot write {path}: nothing can be made in {above}") from None
    except OSError as error:
        raise EvalError(f"cannot write {path}: {error.strerror}") from None


def refuse_other_content(path: Path, beginning: bytes) -> None:
    """Raises EvalError where `write_file` would replace a file that does not begin so, white space aside."""
    try:
        if _is_stream(path) or not path.exists():
            return
        with path.open("rb") as file:
            head = b"".join(file.read(1024).split())
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from None
    if head and not head.startswith(beginning):
        raise EvalError(f"{path} is there and holds something else; name another file, or remove it")


def _is_stream(path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(found.st_mode) or any(_is_open_as(descriptor, found) for descriptor in (1, 2))


def _is_open_as(descriptor: int, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), found)
    except OSError:  # closed
        return False


def _append(path: Path, data: bytes) -> None:
    """Fails at a pipe that nobody reads, rather than wait for a reader."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as stream:
        stream.write(data)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".rowint8-") as scratch:
        whole = Path(scratch) / "whole"
        whole.write_bytes(data)
        if path.exists():
            path.open("r+b").close()  # an error where it must not be written
            whole.chmod(stat.S_IMODE(path.stat().st_mode))
        whole.replace(path)
