"""One lm-eval run of the packaged task in this process: `python -m rowint8.eval.lm_eval_run RESULT < request`.

`quality` starts one such process for each setup, so that no engine shares memory or state with another. The request
on stdin is {"model": an lm-eval backend, "model_args": {...}, "limit": null or a number of questions}. The file RESULT
receives {"metrics": {...}, "samples": [...]} in the form `run_task` describes.
"""

import json
import sys
from pathlib import Path
from typing import Any

TASK_FOLDER = Path(__file__).parent / "tasks"
TASK = "rowint8_basics"


def task_config() -> dict[str, Any]:
    """The task's YAML as a dictionary, with the absolute path of its data.

    A relative path would be looked up in the working directory.
    """
    import yaml

    config = yaml.safe_load((TASK_FOLDER / f"{TASK}.yaml").read_text())
    data_files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(TASK_FOLDER / name) for split, name in data_files.items()}
    return config


def run_task(model: Any, model_args: dict[str, Any] | None, limit: int | None) -> dict[str, Any]:
    """Runs lm-eval on the task.

    Args:
        model: the name of an lm-eval backend ("vllm", "hf", "dummy", ...) or an instance of one.
        model_args: what that backend's constructor takes.
        limit: only this many questions, from the start; None for all.

    Returns:
        "metrics": {"acc": value, "acc_stderr": value, "acc_norm": ..., "acc_norm_stderr": ...}, each in [0, 1], and
        "samples": for each question {"acc": 0 or 1, "acc_norm": 0 or 1, "logprob": of the right answer, natural log}.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    evaluate: Any = simple_evaluate  # its decorator hides the signature
    found = evaluate(model, model_args, tasks=[task_config()], task_manager=manager, limit=limit)
    metrics = {key.replace(",none", ""): value for key, value in found["results"][TASK].items() if ",none" in key}
    return {"metrics": metrics, "samples": [_sample(sample) for sample in found["samples"][TASK]]}


def _sample(sample: dict[str, Any]) -> dict[str, float]:
    """What `quality` compares of one of lm-eval's logged samples."""
    logprob, _ = sample["filtered_resps"][int(sample["target"])]
    return {"acc": sample["acc"], "acc_norm": sample["acc_norm"], "logprob": float(logprob)}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_task(**json.load(sys.stdin))))
