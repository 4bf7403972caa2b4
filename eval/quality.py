"""What INT8 weights cost in quality: one lm-eval task through the real vLLM, unquantized weights against rowint8.

Each setup runs in a process of its own. Both answer the same questions, so the difference is taken question by
question: its standard error is far smaller than that of either accuracy. "logprob", the log-probability of the right
answer, sees changes that are too small to flip an answer.
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rowint8.eval.console import compact_table
from rowint8.eval.lm_eval_run import TASK
from rowint8.eval.processes import require_package, run_quietly, vllm_environment
from rowint8.eval.schema import QualityRow

SETUPS = {"unquantized": None, "rowint8": "rowint8"}
"""Setup to vLLM's `--quantization`. The first is what the second is compared with."""
METRICS = ("acc", "acc_norm", "logprob")
MAX_MODEL_LEN = 128


@dataclass(frozen=True)
class PairedDifference:
    """Of two setups over the same questions: other minus base."""

    mean: float
    stderr: float
    """Standard deviation of the differences (n - 1) / sqrt(n)."""
    gained: int
    """Questions where the other is higher."""
    lost: int
    """Questions where the base is higher."""


def paired_difference(base: Sequence[float], other: Sequence[float]) -> PairedDifference:
    """Compares two setups question by question.

    Raises:
        ValueError: the two differ in length, or there are fewer than two questions.
    """
    differences = [b - a for a, b in zip(base, other, strict=True)]
    mean, stderr = mean_and_stderr(differences)
    gained = sum(difference > 0 for difference in differences)
    lost = sum(difference < 0 for difference in differences)
    return PairedDifference(mean, stderr, gained, lost)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, stdev (n - 1) / sqrt(n), as lm-eval defines it for means.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least two values, got {len(values)}")
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def default_dtype() -> str:
    """bfloat16 on a GPU; float32 on the CPU, where bf16 products are slow without AVX-512 BF16."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def run_setup(model: Path, setup: str, dtype: str, limit: int | None) -> dict[str, Any]:
    """Runs the task on one of SETUPS in a new process; returns what `lm_eval_run.run_task` does.

    Raises:
        EvalError: vLLM or lm-eval is not installed, or the run failed.
    """
    require_package("lm_eval", "run `pip install 'rowint8[eval]'`")
    require_package("vllm", "run `pip install 'rowint8[vllm]'`")
    model_args = {
        "pretrained": str(model.resolve()),
        "dtype": dtype,
        "quantization": SETUPS[setup],
        "max_model_len": MAX_MODEL_LEN,
        "enforce_eager": True,
    }
    request = json.dumps({"model": "vllm", "model_args": model_args, "limit": limit})
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        run_quietly([sys.executable, "-m", "rowint8.eval.lm_eval_run", str(result)], _environment(), request)
        return json.loads(result.read_text())


def _environment() -> dict[str, str]:
    """One engine in the worker's own process, with all cores: nothing is served meanwhile."""
    import torch

    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return {**settings, **vllm_environment()}


def quality_rows(runs: dict[str, dict[str, Any]], dtype: str) -> tuple[QualityRow, ...]:
    """Rows of both setups from what `run_setup` returned for each of SETUPS."""
    base_name, other_name = SETUPS
    rows = [_row(base_name, metric, dtype, runs[base_name]) for metric in METRICS]
    for metric in METRICS:
        paired = paired_difference(_values(runs[base_name], metric), _values(runs[other_name], metric))
        rows.append(_row(other_name, metric, dtype, runs[other_name], paired))
    return tuple(rows)


def _values(run: dict[str, Any], metric: str) -> list[float]:
    return [sample[metric] for sample in run["samples"]]


def _row(
    setup: str, metric: str, dtype: str, run: dict[str, Any], paired: PairedDifference | None = None
) -> QualityRow:
    """acc and acc_norm are lm-eval's own numbers; logprob is averaged here."""
    reported = run["metrics"]
    if metric in reported:
        value, stderr = reported[metric], reported[f"{metric}_stderr"]
    else:
        value, stderr = mean_and_stderr(_values(run, metric))
    flips = paired is not None and metric != "logprob"
    return QualityRow(
        engine="vllm",
        setup=setup,
        task=TASK,
        metric=metric,
        dtype=dtype,
        questions=len(run["samples"]),
        value=value,
        stderr=stderr,
        difference=paired.mean if paired else None,
        difference_stderr=paired.stderr if paired else None,
        gained=paired.gained if paired and flips else None,
        lost=paired.lost if paired and flips else None,
    )


def quality_table(rows: Sequence[QualityRow]) -> Table:
    """One line a metric: both setups, their paired difference and the answers that flipped."""
    base_name, other_name = SETUPS
    first = rows[0]
    table = compact_table(
        title=f"{first.task}: {first.questions} questions, arithmetic in {first.dtype}",
        caption="± standard error; difference: paired, question by question; logprob: of the right answer",
    )
    for heading in ("metric", base_name, other_name, "difference", "gained / lost"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    by_key = {(row.setup, row.metric): row for row in rows}
    for metric in METRICS:
        base, other = by_key[base_name, metric], by_key[other_name, metric]
        table.add_row(
            metric,
            f"{base.value:.4f} ± {base.stderr:.4f}",
            f"{other.value:.4f} ± {other.stderr:.4f}",
            f"{other.difference:+.4f} ± {other.difference_stderr:.4f}",
            "" if other.gained is None else f"{other.gained} / {other.lost}",
        )
    return table
