"""Imports run down: between the folders, between the rooms of eval/, and in no circle of modules.

Every import counts: those inside functions, those for type checkers only, and modules that are imported by a string.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

FOLDERS = {
    "kernels": {"kernels"},
    "baseline_engine": {"kernels", "baseline_engine"},
    "vllm_plugin": {"kernels", "vllm_plugin"},
    "eval": {"kernels", "baseline_engine", "vllm_plugin", "eval"},
}
"""Folder to the folders that it may import."""

EVAL_FLOORS = (
    "errors",
    "models markdown processes tables worker writing",
    "results",
    "quantize",
    "demo_model",
    "kernels",
    "engines",
    "demo doctor matrix",
    "quality",
    "plots",
    "report",
    "cli",
)
"""Rooms and files of eval/, the ground first. Each may import what stands on its own floor or below."""


def modules() -> dict[str, Path]:
    """Module name to its file."""
    paths = (path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))
    return {".".join(("rowint8", *path.relative_to(REPO).with_suffix("").parts)): path for path in paths}


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """The project's modules that a module imports, itself left out."""
    found: list[str] = []
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [full if full in MODULES else str(node.module) for full in names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    packages = [f"{module}.__init__" for module in found]
    return {*found, *packages} & MODULES.keys() - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def floor_of(module: str) -> int:
    part = module.split(".")[2]
    if part == "__init__":
        return 0
    return next(floor for floor, parts in enumerate(EVAL_FLOORS) if part in parts.split())


def upward(module: str, imported: str) -> bool:
    """Whether the import runs up."""
    folder, other = module.split(".")[1], imported.split(".")[1]
    if other not in FOLDERS[folder]:
        return True
    return folder == other == "eval" and floor_of(imported) > floor_of(module)


def test_imports_run_down():
    assert sum(map(len, IMPORTS.values())) > 200, "the imports are not found"
    up = [f"{name} imports {other}" for name, found in IMPORTS.items() for other in found if upward(name, other)]
    assert sorted(up) == []


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_table_names_what_eval_holds():
    there = {path.stem for path in (REPO / "eval").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {part for parts in EVAL_FLOORS for part in parts.split()} == there - {"__init__"}


def test_rooms_are_small_enough_to_know():
    """At most 22 entries at the top of eval/, at most 12 files in a room of it."""
    entries = [path for path in (REPO / "eval").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 22
    rooms = {path.name: len(list(path.glob("*.py"))) for path in entries if path.is_dir()}
    assert {room: files for room, files in rooms.items() if files > 12} == {}
