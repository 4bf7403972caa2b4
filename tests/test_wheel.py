"""A wheel that is installed without -e holds every room: one that pyproject does not list imports only where it is
installed as editable."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "baseline_engine", "vllm_plugin", "eval")
TASKS = ("rowint8_basics.yaml", "rowint8_basics.jsonl")


STAMP = Path("eval", "results", "commit.json")


def test_a_wheel_holds_every_room_and_the_task(tmp_path):
    source = tmp_path / "source"  # built in a copy: a build leaves folders behind, and finds those of the last one
    for name in FOLDERS:
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / STAMP).write_text("{}")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("rowint8-*.whl")
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("*.py")}
    tasks = {Path("eval", "tasks", name) for name in TASKS}
    assert packed == {f"rowint8/{path.as_posix()}" for path in modules | tasks | {STAMP}}
    assert len(modules) > 80
