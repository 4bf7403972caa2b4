"""What INT8 weights cost in quality: the same lm-eval tasks on several backends, compared question by question.

Each backend runs in a process of its own. All answer the same questions, so the difference from the first one is taken
question by question (see `paired`): its standard error is far smaller than that of either value.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rowint8.baseline_engine.errors import shown
from rowint8.baseline_engine.files import read_json
from rowint8.eval.engines.setups import SETUPS
from rowint8.eval.errors import EvalError
from rowint8.eval.processes import require_package, run_worker, vllm_environment
from rowint8.eval.quality import lm_eval_run, paired
from rowint8.eval.quality.tasks import Task
from rowint8.eval.results.schema import EngineName, QualityRow


@dataclass(frozen=True)
class Backend:
    """What runs the model, and what becomes of its linear weights."""

    engine: EngineName
    setup: Literal["unquantized", "rowint8", "rowint8-a8"]


BACKENDS = {
    "transformers": Backend("transformers", "unquantized"),
    "baseline": Backend("baseline", "unquantized"),
    "baseline-rowint8": Backend("baseline", "rowint8"),
    "baseline-rowint8-a8": Backend("baseline", "rowint8-a8"),
    "vllm": Backend("vllm", "unquantized"),
    "vllm-rowint8": Backend("vllm", "rowint8"),
    "vllm-rowint8-a8": Backend("vllm", "rowint8-a8"),
}
"""rowint8-a8 has INT8 activations too."""
_PACKAGES = {"transformers": ("accelerate", "eval"), "baseline": ("lm_eval", "eval"), "vllm": ("vllm", "vllm")}
"""What an engine needs here besides lm-eval: a package, and the extra of ours that installs it."""


def choose(names: str) -> dict[str, Backend]:
    """BACKENDS by their names, given with commas between them.

    Raises:
        EvalError: a name is unknown, or what its backend needs is not installed.
    """
    chosen = {name.strip(): BACKENDS.get(name.strip()) for name in names.split(",")}
    if unknown := [name for name, backend in chosen.items() if backend is None]:
        raise EvalError(f"--backends has {', '.join(map(repr, unknown))}; accepted are {', '.join(BACKENDS)}")
    found = {name: backend for name, backend in chosen.items() if backend is not None}
    require_package("lm_eval", "run `pip install 'rowint8[eval]'`")
    for name, backend in found.items():
        package, extra = _PACKAGES[backend.engine]
        require_package(package, f"run `pip install 'rowint8[{extra}]'` or leave {name} out of --backends")
    return found


def default_dtype() -> str:
    """bfloat16 on a GPU; float32 on the CPU, where bf16 products are slow without AVX-512 BF16."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def context_of(model: Path, wanted: int) -> int:
    """Tokens that every backend can show the model at a time: at most `wanted`, and two fewer than it has positions.

    vLLM keeps the two for itself: it cannot score a text without generating after it.

    Raises:
        EngineError, EvalError: config.json cannot be read, or has no number of positions.
    """
    positions = read_json(model / "config.json").get("max_position_embeddings", wanted + 2)
    if type(positions) is not int or positions < 3:
        raise EvalError(
            f"{model / 'config.json'}: max_position_embeddings is {shown(positions)}; accepted are 3 and more"
        )
    return min(wanted, positions - 2)


def run_backend(
    backend: Backend,
    model: Path,
    tasks: Sequence[Task],
    dtype: str,
    max_length: int,
    limit: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Runs the tasks on one backend in a new process; returns what `lm_eval_run.run` does.

    Args:
        dtype: of the arithmetic: "bfloat16", "float16" or "float32".
        max_length: see `context_of`.
        limit: only this many questions of each task.
        output: a folder for lm-eval's own JSON and samples.

    Raises:
        EvalError: the run failed.
    """
    name, arguments = _lm_eval_model(backend, dtype, max_length)
    request = {
        "model": name,
        "model_args": {"pretrained": str(model.resolve()), "dtype": dtype, **arguments},
        "tasks": tasks,
        "limit": limit,
        "output": str(output.resolve()) if output else None,
    }
    return run_worker(lm_eval_run.run, request, _environment(hub=any(isinstance(task, str) for task in tasks)))


def _lm_eval_model(backend: Backend, dtype: str, max_length: int) -> tuple[str, dict[str, Any]]:
    """lm-eval's name of the backend, and the arguments of its own."""
    import torch

    cuda = torch.cuda.is_available()
    match backend.engine:
        case "transformers":
            # It holds the logits of a whole batch; their logarithms are taken in fp32, as the others do.
            where = {"device": "cuda", "batch_size": 32} if cuda else {"device": "cpu", "batch_size": 8}
            return "hf", {"max_length": max_length, "softmax_dtype": "float32", **where}
        case "baseline":
            arguments = {"max_length": max_length, "mode": "graph" if cuda else "eager"}
            int8 = {} if backend.setup == "unquantized" else {"quantization": "rowint8"}
            return "baseline", arguments | int8 | ({"activations": "int8"} if backend.setup == "rowint8-a8" else {})
        case "vllm":
            setup = SETUPS["bf16" if backend.setup == "unquantized" else backend.setup]
            return "vllm", {"max_model_len": max_length + 2, "enforce_eager": True, **setup.arguments}


def _environment(hub: bool) -> dict[str, str]:
    """The environment of a worker: one engine in its own process, with all cores.

    It uses the network for data from the hub only.
    """
    import torch

    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "DISABLE_MULTIPROC": "1",  # lm-eval would fork a process that uses a GPU, to resample standard errors
    }
    environment = {**settings, **vllm_environment()}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if hub and name not in os.environ:
            del environment[name]
    return environment


def quality_rows(
    backend: Backend, dtype: str, run: dict[str, Any], base: dict[str, Any] | None
) -> tuple[QualityRow, ...]:
    """A row for each metric of each task, from what `run_backend` returned; `base` is what the run is compared with."""
    return tuple(
        _row(backend, dtype, task, name, measured, base["tasks"][task]["metrics"][name] if base else None)
        for task, measured in run["tasks"].items()
        for name in measured["metrics"]
    )


def _row(
    backend: Backend, dtype: str, task: str, name: str, measured: dict[str, Any], base: dict[str, Any] | None
) -> QualityRow:
    """Values and standard errors are lm-eval's own, as far as it gives them."""
    found = measured["metrics"][name]
    if not math.isfinite(found["value"]):
        what = f"{task}: {name} of {backend.engine} {backend.setup} is {found['value']}"
        raise EvalError(f"{what}; the model's logits are NaN or infinite in {dtype}, or its weights are at fault")
    items, stderr = _items(name, found), found["stderr"]
    base_items = _items(name, base) if base else None
    pair = paired.paired_difference(_metric(name), base_items, items) if base_items and items else None
    if stderr is None and items:
        stderr = paired.standard_error(_metric(name), items)
    return QualityRow(
        engine=backend.engine,
        setup=backend.setup,
        task=task,
        metric=name,
        dtype=dtype,
        questions=measured["documents"],
        value=found["value"],
        stderr=stderr,
        difference=pair.difference if pair else None,
        difference_stderr=pair.stderr if pair else None,
        gained=pair.gained if pair else None,
        lost=pair.lost if pair else None,
    )


def _metric(name: str) -> str:
    return name.partition(",")[0]


def _items(name: str, found: dict[str, Any]) -> list[paired.Item] | None:
    """What the metric was made of; None where `paired` knows no way to make lm-eval's value of it."""
    items = [paired.Item(*numbers) for numbers in found["items"] or []]
    if not items or not math.isclose(paired.metric_value(_metric(name), items), found["value"], rel_tol=1e-6):
        return None
    return items
