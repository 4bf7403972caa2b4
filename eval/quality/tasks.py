"""Which tasks `rowint8 quality` can run: the project's own, lm-eval's by their official names, and those from a folder.

From a folder only the data comes: prompts and metrics stay those of the official task, because an entry of a group
inherits what it does not override (lm-eval 0.4.13).
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rowint8.eval.errors import EvalError

TASK_FOLDER = Path(__file__).parents[1] / "tasks"
TASK = "rowint8_basics"
"""The project's own: 200 sentences to complete."""

Task = str | dict[str, Any]
"""An official name, or what lm-eval takes in its place."""

_NO_TRAINING: dict[str, Any] = {"training_split": None}
_TEST_ONLY: dict[str, Any] = {"training_split": None, "validation_split": None}
_FILES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "wikitext": ({"test": "wikitext/wikitext2_test.jsonl"}, _TEST_ONLY),
    "lambada_openai": ({"test": "lambada_openai/lambada_test.jsonl"}, {}),
    "piqa": ({"validation": "piqa/validation.jsonl"}, _NO_TRAINING),
    "arc_easy": ({"test": "arc/arc_easy_test.jsonl"}, _TEST_ONLY),
    "gsm8k": ({"train": "gsm8k/train_first200.jsonl", "test": "gsm8k/test.jsonl"}, {}),
}
"""Official task to (split to its file in the folder, what else to override: the splits that are not there)."""


def resolve(names: Sequence[str], data: Path | None) -> list[Task]:
    """What lm-eval's `simple_evaluate` takes for these tasks; `data` is the folder that holds their test sets, if any.

    Raises:
        EvalError: a name is unknown, or the folder has no file for it.
    """
    own: list[Task] = [project_task()] if TASK in names else []
    others = list(dict.fromkeys(name for name in names if name != TASK))
    if data is None:
        _check_official(others)
        return [*own, *others]
    local = local_tasks(data)
    if unknown := [name for name in others if name not in local]:
        accepted = ", ".join([TASK, *local])
        raise EvalError(f"--tasks has {', '.join(unknown)}; with --data {data} accepted are {accepted}")
    return [*own, {"group": "data", "task": [local[name] for name in others]}] if others else own


def project_task() -> dict[str, Any]:
    """The project's task: its YAML as a dictionary, with the absolute path of its data.

    A relative path would be looked up in the working directory.
    """
    import yaml

    config = yaml.safe_load((TASK_FOLDER / f"{TASK}.yaml").read_text())
    data_files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(TASK_FOLDER / name) for split, name in data_files.items()}
    return config


def local_tasks(data: Path) -> dict[str, dict[str, Any]]:
    """Official task to an entry of a group that reads it from files: every task all of whose files are in the folder.

    The folder is laid out as `_FILES` says; each file blimp/NAME.jsonl is the task blimp_NAME.
    """
    blimp = sorted((data / "blimp").glob("*.jsonl"))
    files = _FILES | {f"blimp_{path.stem}": ({"train": f"blimp/{path.name}"}, {}) for path in blimp}
    tasks = {}
    for name, (splits, overrides) in files.items():
        paths = {split: (data / file).resolve() for split, file in splits.items()}
        if all(path.is_file() for path in paths.values()):
            source = {"data_files": {split: str(path) for split, path in paths.items()}}
            read = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}
            tasks[name] = {"task": name, **read, **overrides}
    return tasks


def _check_official(names: Sequence[str]) -> None:
    if not names:
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    if unknown := [name for name in names if name not in known]:
        close = difflib.get_close_matches(unknown[0], known)
        like = f"; {', '.join(close)} exist" if close else ""
        raise EvalError(
            f"--tasks has {', '.join(unknown)}{like}; accepted are {TASK} and what `lm-eval ls tasks` lists"
        )
