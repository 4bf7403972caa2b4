"""A folder that appears whole or not at all, whatever ends the program that writes it."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rowint8.eval.errors import EvalError

_PREFIX = ".rowint8-folder-"
"""Begins the names of hidden folders. Each is locked (flock) for as long as the process that fills it lives."""


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which is renamed to `out` when the block ends without an exception.

    It lies hidden beside `out`, and its files get the umask's mode. What killed processes left there is removed; what a
    live one fills is not.

    Raises:
        EvalError: `out` exists or cannot be written, or the disk is full.
    """
    refuse_existing(out)
    try:
        parent = Path(os.path.abspath(out)).parent
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        with _locked_folder(parent) as scratch:
            whole = scratch / "whole"
            whole.mkdir()
            yield whole
            for path in whole.iterdir():  # safetensors makes files that only this user can read
                path.chmod(whole.stat().st_mode & 0o666)
            os.rename(whole, out)
    except OSError as error:
        raise EvalError(f"cannot write {out}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise EvalError(f"cannot write {out}: {error}") from None


def refuse_existing(out: Path) -> None:
    """Raises EvalError where `out` is a file, a folder, a link or no possible name, or a home that is not there."""
    if str(out).startswith("~"):
        raise EvalError(f"cannot write {out}: there is no such home; for a folder of that name give ./{out}")
    try:
        os.fsencode(os.path.abspath(out)).decode("utf-8")
        exists = out.exists() or out.is_symlink()
    except OSError as error:
        raise EvalError(f"cannot write {out}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise EvalError(f"cannot write {out}: the name is no UTF-8, and safetensors reads no others") from None
    if exists:
        raise EvalError(f"{out} exists already; remove it or give another folder")


@contextmanager
def _locked_folder(parent: Path) -> Iterator[Path]:
    folder, lock = _make_locked(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_locked(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_PREFIX))
        try:
            return folder, _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process found it before it was locked, and removes it as abandoned
        except OSError:
            return folder, None  # a file system without locks: nobody takes the folder for abandoned


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = _lock(folder)
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed.

    Raises:
        BlockingIOError, FileNotFoundError: another process holds the lock, or has removed the folder.
        OSError: the file system has no locks, or the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
