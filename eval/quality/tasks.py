"""Which tasks `rowint8 quality` can run: the project's own, lm-eval's by their official names, and a user's own YAML.

The data of an official task may come from a folder, by a rule: the split SPLIT of the task NAME is in one of

    NAME/SPLIT.jsonl        gsm8k/test.jsonl; more words may stand beside the split, as in wikitext/wikitext2_test.jsonl
    PART/REST.jsonl         NAME is PART_REST, and its evaluation split is all there is: blimp/causative.jsonl
    PART/REST_SPLIT.jsonl   arc/arc_easy_test.jsonl

From a folder only the data comes: prompts and metrics stay those of the official task, because an entry of a group
inherits what it does not override (lm-eval 0.4.13).
"""

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rowint8.eval.errors import EvalError

TASK_FOLDER = Path(__file__).parents[1] / "tasks"
TASK = "rowint8_basics"
"""The project's own: 200 sentences to complete."""

Task = str | dict[str, Any]
"""An official name, or what lm-eval takes in its place."""

_SPLITS = ("training_split", "validation_split", "test_split")
"""An official task's fields that name its splits; the last one that it has is evaluated."""


def resolve(names: Sequence[str], data: Path | None) -> list[Task]:
    """What lm-eval's `simple_evaluate` takes for these tasks.

    Args:
        names: official ones, TASK, or paths of YAML files.
        data: the folder that holds the test sets of the official ones, if any.

    Raises:
        EvalError: a name is unknown, or the folder has no file for it.
    """
    own: list[Task] = [project_task()] if TASK in names else []
    own += [str(Path(name).resolve()) for name in names if _is_file(name)]
    others = list(dict.fromkeys(name for name in names if name != TASK and not _is_file(name)))
    if not others:
        return own
    manager = _manager()
    _check_official(others, manager.all_tasks)
    if data is None:
        return [*own, *others]
    return [*own, {"group": "data", "task": [local_task(name, data, manager) for name in others]}]


@cache
def _manager() -> Any:
    """lm-eval's index of official tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_file(name: str) -> bool:
    """Whether the name of a task is the path of a YAML file.

    Raises:
        EvalError: it looks like one, and there is none.
    """
    if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise EvalError(f"--tasks has {name}, which is no file; give the path of a task's YAML, or an official name")
    return name.endswith((".yaml", ".yml"))


def project_task() -> dict[str, Any]:
    """The project's task: its YAML as a dictionary, with the absolute path of its data.

    A relative path would be looked up in the working directory.
    """
    import yaml

    config = yaml.safe_load((TASK_FOLDER / f"{TASK}.yaml").read_text())
    data_files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(TASK_FOLDER / name) for split, name in data_files.items()}
    return config


def local_task(name: str, data: Path, manager: Any) -> dict[str, Any]:
    """An official task as an entry of a group that reads it from the folder; splits without a file are left out.

    Raises:
        EvalError: it is no single task, or its evaluation split has no file.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if name not in manager.all_subtasks:
        raise EvalError(f"--tasks has {name}, which is several tasks; with --data name each, such as blimp_causative")
    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=False)
    splits = {field: config[field] for field in _SPLITS if config.get(field)}
    evaluated = list(splits.values())[-1]
    found = {split: _file_of(name, split, data, split == evaluated) for split in splits.values()}
    if found[evaluated] is None:
        wanted = data / name / f"{evaluated}.jsonl"
        raise EvalError(f"--data {data} has no file for {name}; put its {evaluated} split there as {wanted}")
    files = {split: str(path.resolve()) for split, path in found.items() if path}
    absent = {field: None for field, split in splits.items() if split not in files}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **absent,
    }


def _file_of(name: str, split: str, data: Path, evaluated: bool) -> Path | None:
    """The file of a split, by the module's rule; the first of several."""
    words = name.split("_")
    for length in range(len(words), 0, -1):
        rest = set(words[length:])
        for path in sorted((data / "_".join(words[:length])).glob("*.jsonl")):
            told = set(path.stem.split("_"))
            if rest <= told and (split in told or (rest and evaluated and told == rest)):
                return path
    return None


def _check_official(names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        close = difflib.get_close_matches(unknown[0], known)
        like = f"; {', '.join(close)} exist" if close else ""
        raise EvalError(
            f"--tasks has {', '.join(unknown)}{like}; accepted are {TASK}, what `lm-eval ls tasks` lists, and the path "
            "of a YAML file"
        )
