"""What a release is: an sdist and a wheel that a package index takes, and that install without this checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "baseline_engine", "vllm_plugin", "eval")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
TASKS = ("rowint8_basics.yaml", "rowint8_basics.jsonl")
STAMP = Path("eval", "results", "commit.json")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
PICTURE = "results/engine-h200-batch.svg"
INSTALLED = """
import json, importlib.metadata as metadata
found = metadata.entry_points(group="vllm.general_plugins")
print(json.dumps({entry.name: entry.load().__module__ for entry in found}))
"""
IN_VLLM = """
import rowint8.vllm_plugin
from vllm.plugins import load_general_plugins
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
load_general_plugins()
print("rowint8" in QUANTIZATION_METHODS, rowint8.vllm_plugin.__file__)
"""


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel), the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"  # built in a copy: a build leaves folders behind, and finds those of the last one
    for name in FOLDERS:
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / STAMP).write_text("{}")
    for name in FILES:
        shutil.copy(REPO / name, source)
    with (source / "README.md").open("a") as readme:
        readme.write(f"\n![a picture]({PICTURE})\n")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder that holds the wheel's packages and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, built[1])
    return folder


def test_a_wheel_holds_every_room_and_the_task(built):
    with ZipFile(built[1]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = (path for folder in FOLDERS for path in (REPO / folder).rglob("*.*") if path.suffix in (".py", ".c"))
    modules = {path.relative_to(REPO) for path in sources}
    tasks = {Path("eval", "tasks", name) for name in TASKS}
    assert packed == {f"rowint8/{path.as_posix()}" for path in modules | tasks | {STAMP}}
    assert len(modules) > 80


def test_a_package_index_takes_both(built):
    told = run(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert told.count("PASSED") == 2


def test_every_link_on_the_index_page_leads_to_a_file_of_the_repository(built):
    with ZipFile(built[1]) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        page = Parser().parsestr(archive.read(metadata).decode()).get_payload()
    links = re.findall(r"\]\(([^)]+)\)", str(page))
    ours = [link for link in links if link.startswith(f"{REPOSITORY}/")]
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert len(ours) > 20
    assert f"{REPOSITORY}/raw/main/{PICTURE}" in ours
    paths = [re.sub(r"^/(blob|raw)/main/", "", link.removeprefix(REPOSITORY).partition("#")[0]) for link in ours]
    assert [path for path in paths if not (REPO / path).exists()] == []


def test_an_empty_venv_finds_the_plugin_and_the_commands(built, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    python = tmp_path / "bin" / "python"
    quiet = "--quiet", "--no-deps", "--no-index"
    run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, built[1])
    assert json.loads(run(python, "-I", "-c", INSTALLED)) == {"rowint8": "rowint8.vllm_plugin"}
    assert {"rowint8", "baseline-generate"} <= {path.name for path in (tmp_path / "bin").iterdir()}


@pytest.mark.vllm
def test_vllm_takes_the_plugin_from_the_wheel(installed):
    told = run(sys.executable, "-c", IN_VLLM, env={**os.environ, "PYTHONPATH": str(installed)}, cwd=installed)
    assert told.splitlines()[-1] == f"True {installed / 'rowint8' / 'vllm_plugin' / '__init__.py'}"


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="not a git checkout")
def test_the_readmes_install_line_works_from_a_git_url(tmp_path):
    [asked] = re.findall(r'^pip install "([^"]+)"', (REPO / "README.md").read_text(), re.MULTILINE)
    assert asked == f"rowint8[vllm] @ git+{REPOSITORY}"
    assert set(re.findall(r"https://github\.com/\w+/rowint8", (REPO / "docs" / "vllm.md").read_text())) == {REPOSITORY}
    here = asked.replace(REPOSITORY, f"file://localhost{REPO}")  # pip wants a host
    quiet = "--quiet", "--no-deps", "--no-build-isolation"
    run(sys.executable, "-m", "pip", "install", *quiet, "--target", tmp_path, here)
    assert (tmp_path / "rowint8" / "vllm_plugin" / "__init__.py").exists()
    assert [path.name for path in tmp_path.glob("*.dist-info")] == [f"rowint8-{PROJECT['version']}.dist-info"]


def test_messages_and_documents_name_extras_that_exist():
    texts = [path.read_text() for folder in FOLDERS for path in (REPO / folder).rglob("*.py")]
    texts += [path.read_text() for path in (REPO / "README.md", *(REPO / "docs").glob("*.md"))]
    named = {extra for text in texts for extra in re.findall(r"rowint8\[(\w+)\]", text)}
    assert {"vllm", "eval", "plots"} <= named <= PROJECT["optional-dependencies"].keys()
