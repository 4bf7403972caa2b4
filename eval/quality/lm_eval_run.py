"""One run of lm-eval, for a process of its own: no engine shares memory or state with another."""

import importlib
from collections.abc import Sequence
from typing import Any

from rowint8.eval.quality import paired
from rowint8.eval.quality.tasks import Task

BOOTSTRAPS = 1000
"""For the standard errors that lm-eval resamples; its own 100,000 take minutes in one process."""


def run(
    model: Any, model_args: dict[str, Any] | None, tasks: Sequence[Task], limit: int | None, output: str | None = None
) -> dict[str, Any]:
    """Runs lm-eval.

    Args:
        model: the name of an lm-eval backend ("vllm", "hf", "baseline", ...) or an instance of one.
        model_args: what that backend's constructor takes.
        tasks: see `tasks.resolve`.
        limit: only this many documents of each task, from the start; None for all.
        output: a folder for lm-eval's own JSON and samples.

    Returns:
        "table": lm-eval's own, in Markdown, and "tasks": for each task {"documents": how many, "metrics": {name:
        {"value": lm-eval's, "stderr": lm-eval's or None, "items": of each document the two numbers of `paired.Item`,
        or None where the metric is not made of such}}}. A metric of a filter is named "metric,filter". Multiple-choice
        tasks have one more, "logprob": of the right answer, natural log, the mean over documents.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    if model == "baseline":
        importlib.import_module("rowint8.eval.quality.lm_eval_engine")  # registers it
    official = any(isinstance(task, str) or "group" in task for task in tasks)
    evaluate: Any = simple_evaluate  # its decorator hides the signature
    tracker = EvaluationTracker(output_path=output)
    found = evaluate(
        model,
        model_args,
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=official),
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        evaluation_tracker=tracker,
    )
    measured = {task: _measured(found, task) for task in found["samples"]}
    _save(tracker, found, found.pop("samples"))
    return {"table": make_table(found), "tasks": measured}


def _save(tracker: Any, found: dict[str, Any], samples: dict[str, Any]) -> None:
    """Writes lm-eval's own JSON and samples where the tracker keeps them."""
    tracker.save_results_aggregated(results=found, samples=samples)
    for task, logged in samples.items():
        tracker.save_results_samples(task_name=task, samples=logged)


def _measured(found: dict[str, Any], task: str) -> dict[str, Any]:
    """What `run` returns of one task."""
    results, samples, metrics = found["results"][task], found["samples"][task], {}
    for key, value in results.items():
        metric, _, name = key.partition(",")
        if name and not metric.endswith("_stderr"):
            items = [paired.item(metric, sample.get(metric)) for sample in samples if sample["filter"] == name]
            stderr = results.get(f"{metric}_stderr,{name}")
            metrics[metric if name == "none" else key] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                "items": None if None in items else items,
            }
    if found["configs"][task].get("output_type") == "multiple_choice":
        items = [_right_answer(sample) for sample in samples]
        if None not in items:
            metrics["logprob"] = {"value": paired.metric_value("logprob", items), "stderr": None, "items": items}
    return {"documents": found["n-samples"][task]["effective"], "metrics": metrics}


def _right_answer(sample: dict[str, Any]) -> Any:
    """Its log-probability; None where lm-eval did not note it as an index."""
    target = str(sample["target"])
    if not target.isdecimal() or int(target) >= len(sample["filtered_resps"]):
        return None
    logprob, _ = sample["filtered_resps"][int(target)]
    return paired.Item(float(logprob), 1.0)
