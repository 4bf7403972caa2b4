"""Docstrings say what a thing is; none begins in the middle of a sentence."""

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "baseline_engine", "vllm_plugin", "eval")


def docstrings(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every string that stands alone as a statement: those of modules, classes, functions, fields."""
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    alone = (node.value for node in found if isinstance(node, ast.Expr))
    return [
        (node.lineno, node.value) for node in alone if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_no_docstring_begins_with_of():
    strings = {path: docstrings(path) for folder in FOLDERS for path in (REPO / folder).rglob("*.py")}
    assert sum(map(len, strings.values())) > 500, "the docstrings are not found"
    begun = [
        f"{path.relative_to(REPO)}:{line}"
        for path, found in strings.items()
        for line, text in found
        if text.startswith("Of ")
    ]
    assert begun == []
