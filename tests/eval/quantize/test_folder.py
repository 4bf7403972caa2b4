"""rowint8.eval.quantize.folder: whole or not at all, cleaned after a kill, readable by whom the umask lets."""

import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize import folder as job
from rowint8.eval.quantize.folder import whole_folder

FILL = """
import pathlib, sys
from rowint8.eval.quantize.folder import whole_folder
with whole_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "part").write_text("half")
    print("filling", flush=True)
    sys.stdin.read()
"""


@contextmanager
def filling(out):
    """A process that fills `out` until its stdin is closed."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", FILL, str(out)], text=True, **pipes) as process:
        assert process.stdout.readline() == "filling\n"
        yield process


def make(out):
    with whole_folder(out) as folder:
        (folder / "config.json").write_text("{}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0, 0o777, 0o666)]
)
def test_modes_follow_the_umask(tmp_path, umask, folder_mode, file_mode):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")
            save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"config.json": file_mode, "model.safetensors": file_mode}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder_mode


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    for _ in range(2):
        with filling(tmp_path / "killed") as process:
            process.kill()
    assert len(names(tmp_path)) == 1, "the second run removes what the first left"
    make(tmp_path / "other")
    assert names(tmp_path) == ["other"]


def test_what_a_live_run_fills_is_not_removed(tmp_path):
    with filling(tmp_path / "slow") as process:
        make(tmp_path / "quick")
        process.communicate("")
        assert process.returncode == 0
    assert names(tmp_path) == ["quick", "slow"]
    assert (tmp_path / "slow" / "part").read_text() == "half"


def test_a_stopped_run_still_holds_its_folder(tmp_path):
    with filling(tmp_path / "slow") as process:
        process.send_signal(signal.SIGSTOP)
        make(tmp_path / "quick")
        process.send_signal(signal.SIGCONT)
        process.communicate("")
    assert names(tmp_path) == ["quick", "slow"]


def test_a_folder_that_another_process_takes_for_abandoned_is_made_again(tmp_path, monkeypatch):
    lock, taken = job._lock, []

    def take_first(folder):
        if not taken:
            taken.append(folder)
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(job, "_lock", take_first)
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert len(taken) == 1


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(job.fcntl, "flock", refuse)
    (tmp_path / ".rowint8-folder-other").mkdir()
    make(tmp_path / "out")
    assert names(tmp_path) == [".rowint8-folder-other", "out"], "without a lock nobody knows that it is abandoned"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        refused = pytest.raises(EvalError, match=r"^cannot write .*out: File too large$")
        with refused, whole_folder(tmp_path / "out") as folder:
            (folder / "big").write_text("x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "n" * 256,
        "~nouser/x",
        "~",
        "\udcff",
        "\udcff/out",
        "file/below",
        "file",
        "here",
        "link",
        ".",
        "..",
        "/dev/null",
        "/proc/rowint8",
    ],
)
def test_what_cannot_be_a_new_folder_is_one_line(tmp_path, name, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvalError, match=r"exists already; remove it|^cannot write ") as refused:
        make(type(tmp_path)(name))
    assert "\n" not in str(refused.value)
    assert names(tmp_path) == ["file", "here", "link"]


@pytest.mark.parametrize("name", ["n" * 255, "a b", "[bold]", "é", "new/deep/out", "-", ".hidden"])
def test_any_other_name_will_do(tmp_path, name):
    make(tmp_path / name)
    assert (tmp_path / name / "config.json").read_text() == "{}"
