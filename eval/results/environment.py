"""What this machine is and what is installed, for the environment block of a result file.

The commit comes from git. Where the code runs without git, as from a wheel or on a machine that has a copy of the tree,
it comes from a stamp that travels with the code: `make stamp` writes it.
"""

import ast
import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.results.files import Environment
from rowint8.eval.writing import write_file

STAMP = "commit.json"
"""The stamp's name, beside this file. It holds the commit, whether tracked files differed from it, and `_digest`."""
_FOLDERS = ("kernels", "baseline_engine", "vllm_plugin", "eval")
_TELLING = (
    "eval/report/",
    "eval/plots.py",
    "eval/tables.py",
    "eval/markdown.py",
    "eval/matrix.py",
    "eval/cli/report.py",
)
"""Code that tells results and changes none."""


def describe_environment() -> Environment:
    """The environment of this process. Imports torch."""
    import torch

    gpu = torch.cuda.is_available()
    commit, dirty = _from_git() or _from_stamp() or (None, None)
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name() if gpu else cpu_model(),
        driver=_driver() if gpu else None,
        os=platform.platform(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        rowint8=_version("rowint8") or "not installed",
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        vllm=_version("vllm"),
        git_commit=commit,
        git_dirty=dirty,
        code=code_hash(_root()),
    )


def cpu_model() -> str:
    """The CPU's model and its logical cores, such as "AMD EPYC 9554, 64 cores"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@cache
def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _from_git() -> tuple[str, bool] | None:
    """The commit and whether tracked files differ from it, but for results, which a measurement writes as it goes.

    None where this very file is not tracked: an installed copy may lie inside a checkout of something else.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git("rev-parse", "--verify", "HEAD") if tracked else None
    changes = "--untracked-files=no", "--", ":(top)", ":(top,exclude)results"
    return (commit, bool(_git("status", "--porcelain", *changes))) if commit else None


def write_stamp() -> Path:
    """Writes the stamp beside this file, for copies of the code that have no git.

    Raises:
        EvalError: git does not know the commit here, or the file cannot be written.
    """
    found = _from_git()
    if found is None:
        raise EvalError(f"{Path(__file__).parent} is in no git checkout of the code; stamp it where it is")
    path = Path(__file__).with_name(STAMP)
    write_file(path, json.dumps({"commit": found[0], "dirty": found[1], "digest": _digest()}) + "\n")
    return path


def _from_stamp() -> tuple[str, bool] | None:
    """As `_from_git`. Code that is not what was stamped counts as changed."""
    try:
        stamp = json.loads(Path(__file__).with_name(STAMP).read_text())
    except FileNotFoundError:
        return None
    return stamp["commit"], stamp["dirty"] or stamp["digest"] != _digest()


def _root() -> Path:
    """Where _FOLDERS lie, in a tree and in a wheel."""
    return Path(__file__).parents[2]


def _digest() -> str:
    """SHA-256 over the names and contents of the code."""
    digest = hashlib.sha256()
    for name, path in _sources(_root()):
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def code_hash(root: Path) -> str:
    """16 digits over the names and statements of the code that measures: reports and plots, docstrings, comments and
    empty lines do not count, so that files of commits which differ in words alone are told to be alike."""
    digest = hashlib.sha256()
    for name, path in _sources(root):
        if not name.startswith(_TELLING):
            digest.update(f"{name}\0{_statements(path)}\0".encode())
    return digest.hexdigest()[:16]


def _sources(root: Path) -> list[tuple[str, Path]]:
    """Name below `root` and path of each file, in order."""
    paths = [path for folder in _FOLDERS for end in ("py", "c") for path in (root / folder).rglob(f"*.{end}")]
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _statements(path: Path) -> str:
    """The text without lines of comments, strings that stand for themselves, and empty lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))) if path.suffix == ".py" else ():
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str | None:
    """First line that a command prints; None where it is absent, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None
