"""What this machine is and what is installed, for the environment block of a result file."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rowint8.eval.results.files import Environment


def describe_environment() -> Environment:
    """The environment of this process. Imports torch."""
    import torch

    gpu = torch.cuda.is_available()
    commit = _git_commit()
    return Environment(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name() if gpu else cpu_model(),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        os=platform.platform(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        rowint8=version("rowint8"),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=version("transformers"),
        vllm=_version("vllm"),
        git_commit=commit,
        git_dirty=_has_changes() if commit else None,
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


def _git_commit() -> str | None:
    """Only where this very file is tracked: an installed copy may lie inside a checkout of something else."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return _git("rev-parse", "--verify", "HEAD") if tracked else None


def _has_changes() -> bool:
    """Whether tracked files differ from the commit, but for results, which a measurement writes as it goes."""
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results"))


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
