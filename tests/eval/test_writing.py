"""rowint8.eval.writing: a file is written whole or stays as it was, and what is no file stays what it is."""

import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rowint8.eval.errors import EvalError
from rowint8.eval.writing import refuse_other_content, refuse_unwritable, write_file


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_umasks_mode_and_the_folders_it_needs(tmp_path):
    for mask, wanted in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        path, before = tmp_path / f"{mask:o}" / "deep" / "r.json", os.umask(mask)
        try:
            write_file(path, "é\n")
        finally:
            os.umask(before)
        assert (path.read_text(encoding="utf-8"), mode(path)) == ("é\n", wanted)
        assert [entry.name for entry in path.parent.iterdir()] == ["r.json"]


def test_a_file_that_exists_keeps_its_mode(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    path.chmod(0o664)
    write_file(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o664)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_written(tmp_path, there):
    target, middle, link = tmp_path / "elsewhere" / "r.json", tmp_path / "middle", tmp_path / "link"
    if there:
        write_file(target, "old")
    middle.symlink_to("elsewhere/r.json")
    link.symlink_to("middle")
    write_file(link, "new")
    assert (link.is_symlink(), middle.is_symlink(), target.is_symlink()) == (True, True, False)
    assert target.read_text() == "new"


def test_links_in_a_circle_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(EvalError, match=r"cannot write .*/a: Too many levels of symbolic links"):
        write_file(tmp_path / "a", "")


@pytest.mark.parametrize("through_a_link", [True, False])
def test_a_device_stays_a_device(tmp_path, through_a_link):
    path = tmp_path / "link" if through_a_link else Path("/dev/null")
    if through_a_link:
        path.symlink_to("/dev/null")
    write_file(path, "lost")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert path.is_symlink() == through_a_link


def test_a_pipe_is_written_into(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    content = os.urandom(300_000)  # more than a pipe holds
    with open(os.open(pipe, os.O_RDWR), "rb") as reader:
        thread = threading.Thread(target=lambda: found.append(reader.read(len(content))))
        thread.start()
        write_file(pipe, content)
        thread.join(30)
    assert found == [content]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_that_nobody_reads_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EvalError, match=r"cannot write .*/pipe: No such device or address"):
        write_file(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("goes_to", ["file", "pipe"])
def test_what_stdout_has_is_kept(tmp_path, goes_to):
    code = "print('before', flush=True); write_file(Path('/dev/stdout'), 'written\\n'); print('after')"
    command = [
        sys.executable,
        "-c",
        f"from pathlib import Path; from rowint8.eval.writing import refuse_unwritable, write_file; {code}",
    ]
    if goes_to == "pipe":
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    else:
        with (tmp_path / "out").open("a") as out:
            subprocess.run(command, stdout=out, check=True)
        said = (tmp_path / "out").read_text()
    assert said == "before\nwritten\nafter\n"


@pytest.mark.parametrize("name", [".", "file/below", "x" * 300])
def test_what_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EvalError, match=r"^cannot write ") as refused:
        write_file(tmp_path / name, "x")
    assert "\n" not in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_must_not_be_written_stays(tmp_path):
    program = tmp_path / "program"  # while it runs, not even root may write it
    shutil.copy(shutil.which("sleep") or "", program)
    content = program.read_bytes()
    running = subprocess.Popen([program, "60"])
    try:
        with pytest.raises(EvalError, match=r"cannot write .*/program: Text file busy"):
            write_file(program, "new")
    finally:
        running.kill()
        running.wait()
    assert program.read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this machine has no such device")
def test_a_full_device_is_one_line(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(EvalError, match=r"cannot write .*/full: No space left on device"):
        write_file(tmp_path / "full", "x")


def test_a_full_disk_leaves_the_file_whole(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(EvalError, match=r"cannot write .*README\.md: File too large"):
            write_file(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]


def test_what_cannot_be_written_is_refused_before_it_is_measured(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused = {tmp_path: "it is a folder", tmp_path / "loop": "symbolic links", tmp_path / "file" / "x.json": ""}
    for path, why in refused.items():
        with pytest.raises(EvalError, match=f"cannot write .*{why}"):
            refuse_unwritable(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "new.json")
    for path in (tmp_path / "file", tmp_path / "dangling", tmp_path / "a" / "b" / "c.json", Path("/dev/null")):
        refuse_unwritable(path)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dangling", "file", "loop"]


BEGINNING = b'{"environment":{'


@pytest.mark.parametrize(
    "content", [b"# notes\n", b'{"model_type": "llama"}', b"[1, 2", b"\xff\xfe", b'{"environment": 5}']
)
def test_a_file_of_something_else_is_not_replaced(tmp_path, content):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(content)
    link.symlink_to(path)
    for target in (path, link):
        with pytest.raises(EvalError, match="is there and holds something else; name another file"):
            refuse_other_content(target, BEGINNING)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\n", b'{\n  "environment": {\n    "date"', b'{"environment":{}}'])
def test_a_file_of_the_same_kind_or_of_nothing_may_be_replaced(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    for path in (tmp_path / "file", tmp_path / "new", Path(os.devnull)):
        refuse_other_content(path, BEGINNING)
