"""rowint8.eval.quality: the statistics against numbers worked out by hand, the task in lm-eval, one run in vLLM."""

import collections
import io
import json
import math

import pytest
from rich.console import Console

from rowint8.eval.errors import EvalError
from rowint8.eval.lm_eval_run import TASK, TASK_FOLDER, run_task, task_config
from rowint8.eval.quality import (
    mean_and_stderr,
    paired_difference,
    quality_rows,
    quality_table,
    run_setup,
)

QUESTIONS = [json.loads(line) for line in (TASK_FOLDER / f"{TASK}.jsonl").read_text().splitlines()]


def run(acc, logprob):
    samples = [{"acc": a, "acc_norm": a, "logprob": p} for a, p in zip(acc, logprob, strict=True)]
    mean, stderr = mean_and_stderr(acc)
    metrics = {"acc": mean, "acc_stderr": stderr, "acc_norm": mean, "acc_norm_stderr": stderr}
    return {"metrics": metrics, "samples": samples}


RUNS = {
    "unquantized": run([1, 1, 0, 0], [-1.0, -2.0, -3.0, -4.0]),
    "rowint8": run([1, 0, 1, 1], [-1.5, -2.0, -3.5, -4.0]),
}


def test_mean_and_stderr_by_hand():
    mean, stderr = mean_and_stderr([1, 2, 3, 4])
    assert mean == 2.5
    assert stderr == pytest.approx(math.sqrt(5 / 3) / 2)


def test_paired_difference_by_hand():
    found = paired_difference([1, 1, 0, 0], [1, 0, 1, 1])
    # differences 0, -1, 1, 1: mean 1/4, squared deviations 1/16 + 25/16 + 9/16 + 9/16 = 44/16, variance 11/12
    assert found.mean == 0.25
    assert found.stderr == pytest.approx(math.sqrt(11 / 12) / 2)
    assert (found.gained, found.lost) == (2, 1)


def test_equal_setups_do_not_differ():
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.mean, found.stderr, found.gained, found.lost) == (0, 0, 0, 0)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match="at least two values, got 1"):
        paired_difference([1], [0])


def test_rows_and_table():
    rows = quality_rows(RUNS, "float32")
    by_key = {(row.setup, row.metric): row for row in rows}
    assert len(rows) == len(by_key) == 6
    assert by_key["unquantized", "acc"].difference is None
    accuracy = by_key["rowint8", "acc"]
    assert (accuracy.value, accuracy.difference, accuracy.gained, accuracy.lost) == (0.75, 0.25, 2, 1)
    logprob = by_key["rowint8", "logprob"]
    assert (logprob.value, logprob.difference) == (-2.75, -0.25)
    assert logprob.difference_stderr == pytest.approx(math.sqrt(0.25 / 3) / 2)
    assert logprob.gained is None
    console = Console(file=io.StringIO(), width=80)
    console.print(quality_table(rows))
    drawn = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "0.7500 ± 0.2500" in drawn
    assert "+0.2500 ± 0.4787" in drawn
    assert "2 / 1" in drawn


def test_questions_are_sound():
    contexts = [question["context"] for question in QUESTIONS]
    assert len(contexts) == len(set(contexts)) == 200
    for question in QUESTIONS:
        assert len(set(question["choices"])) == len(question["choices"]) >= 2
        assert question["choices"][question["answer"]]
        assert not question["context"].endswith(" ")
    positions = collections.Counter(question["answer"] for question in QUESTIONS)
    assert max(positions.values()) < 0.5 * len(QUESTIONS), "always choosing one position must not look good"


def oracle(margin: float):
    """An lm-eval model that gives each right answer `margin` more log-probability than the wrong ones."""
    from lm_eval.api.model import LM

    right = {(question["context"], " " + question["choices"][question["answer"]]) for question in QUESTIONS}

    class Oracle(LM):
        def loglikelihood(self, requests):
            return [(-2.0 + margin * (request.args in right), False) for request in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        def generate_until(self, requests):
            raise NotImplementedError

    return Oracle()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another working directory, where a relative data path would not be found, and no network."""
    monkeypatch.chdir(tmp_path)
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def test_task_in_lm_eval_right_and_wrong(elsewhere):
    right = run_task(oracle(+1.0), None, limit=None)
    assert right["metrics"]["acc"] == 1.0
    assert len(right["samples"]) == 200
    assert {sample["logprob"] for sample in right["samples"]} == {-1.0}
    wrong = run_task(oracle(-1.0), None, limit=None)
    assert wrong["metrics"]["acc"] == 0.0
    assert {sample["logprob"] for sample in wrong["samples"]} == {-3.0}


def test_lm_eval_agrees_with_our_standard_error(elsewhere):
    found = run_task("dummy", None, limit=50)
    mean, stderr = mean_and_stderr([sample["acc"] for sample in found["samples"]])
    assert found["metrics"]["acc"] == pytest.approx(mean)
    assert found["metrics"]["acc_stderr"] == pytest.approx(stderr)


def test_data_path_is_absolute():
    (path,) = task_config()["dataset_kwargs"]["data_files"].values()
    assert path == str(TASK_FOLDER / f"{TASK}.jsonl")
    assert path.startswith("/")


def test_missing_vllm_is_one_line(monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(EvalError, match=r"vllm is not installed; run `pip install 'rowint8\[vllm\]'`"):
        run_setup(tmp_path, "rowint8", "float32", None)


@pytest.mark.vllm
def test_rowint8_in_the_real_vllm(smollm2):
    found = run_setup(smollm2, "rowint8", "float32", limit=20)
    assert len(found["samples"]) == 20
    assert found["metrics"]["acc"] >= 0.7, "by chance it would be at most 0.5"
