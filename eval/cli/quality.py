"""`rowint8 quality`, `fidelity` and `agreement`: what INT8 weights change, in answers, distributions and tokens."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from rowint8.baseline_engine.files import read_json
from rowint8.baseline_engine.progress import progress_bar
from rowint8.eval.cli.output import Append, Json, Kept, answer, err, out, write
from rowint8.eval.cli.quantize import TrustRemoteCode
from rowint8.eval.demo_model import DEFAULT_FOLDER
from rowint8.eval.errors import EvalError
from rowint8.eval.models import refuse_quantized
from rowint8.eval.writing import refuse_unwritable

Model = Annotated[Path, typer.Option(help="A model folder.")]
Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Arithmetic in bfloat16, float16 or float32. Default: bfloat16 on a GPU, else float32."),
]
Backends = Annotated[
    str, typer.Option(help="What runs the model, with commas between; the others are compared with the first.")
]
Tasks = Annotated[
    str,
    typer.Option(
        help="lm-eval's names or paths of its YAML files, with commas between. rowint8_basics, of this project, needs "
        "no data."
    ),
]
Data = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="A folder with the official tasks' data as JSON lines, such as DIR/hellaswag/validation.jsonl. "
        "Without it they come from the hub."
    ),
]
Limit = Annotated[Optional[int], typer.Option(min=2, help="Only this many questions of each task.")]  # noqa: UP045
MaxLength = Annotated[int, typer.Option(min=16, help="Tokens the model sees at a time.")]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Keep lm-eval's own JSON and samples in this folder, one subfolder a backend."),
]
Text = Annotated[Path, typer.Option(help="A text file, or .jsonl with the fields page or text.")]
Quantizations = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="rowint8, rowint8-a8 (INT8 activations too), fp8-row, fp8-a8, bf16, int8-group32, rowint8+lm_head or "
        "rowint8-a8+lm_head; rowint8-a8-64 and so on: rotated in smaller blocks. Repeat for more. Default: all."
    ),
]
Checkpoints = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(help="Also a checkpoint of `rowint8 quantize` made from the model. Repeat for more."),
]
Ablate = Annotated[
    bool,
    typer.Option("--ablate", help="Also rowint8 and rowint8-a8, where chosen, in one kind of layer at a time."),
]
Ranks = Annotated[
    int,
    typer.Option(min=1, max=64, help="Ranks of vLLM. With several its tokens are compared with those of vLLM on one."),
]


def quality(
    model: Model = DEFAULT_FOLDER,
    backends: Backends = "transformers,baseline,baseline-rowint8,vllm,vllm-rowint8",
    tasks: Tasks = "rowint8_basics",
    data: Data = None,
    limit: Limit = None,
    max_length: MaxLength = 1024,
    dtype: Dtype = None,
    json_file: Json = None,
    lm_eval_output: Output = None,
) -> None:
    """Compare INT8 with unquantized weights, and this project's engine with others, on tasks of lm-eval.

    Example: rowint8 quality --model models/smollm2-135m-instruct --json quality.json

    Example: rowint8 quality --backends vllm,vllm-rowint8 --tasks lambada_openai,piqa,wikitext --data DIR
    """
    from rowint8.eval.quality import suite as job
    from rowint8.eval.quality.tasks import resolve
    from rowint8.eval.report.quality import quality_tables
    from rowint8.eval.results.schema import QualityRow

    if lm_eval_output:
        refuse_unwritable(lm_eval_output / "results.json")  # lm-eval only warns where it cannot write
    folder, number_format = existing_model(model), arithmetic(dtype)
    chosen, context = job.choose(backends), job.context_of(folder, max_length)
    with err.status("looking up the tasks"):
        found = resolve([name.strip() for name in tasks.split(",")], data)
    kept, base = Kept(json_file, QualityRow, False), None
    for number, (name, backend) in enumerate(chosen.items(), 1):
        output = lm_eval_output / name if lm_eval_output else None
        with err.status(f"lm-eval on {name} ({number} of {len(chosen)})"):
            run = job.run_backend(backend, folder, found, number_format, context, limit, output)
        answer(f"{name}\n{run['table']}")
        kept.add(job.quality_rows(backend, number_format, run, base))
        base = base or run
    for table in quality_tables(kept.rows):
        out.print(table)
    kept.close(ended=True)


def fidelity(
    text: Text,
    model: Model = DEFAULT_FOLDER,
    quantization: Quantizations = None,
    checkpoint: Checkpoints = None,
    ablate: Ablate = False,
    window: Annotated[int, typer.Option(min=2, help="Tokens the model sees at a time.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows taken from the start of the text.")] = 10,
    json_file: Json = None,
    append: Append = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure how far rounded weights move the model: KL, same likeliest token and perplexity on a text.

    Example: rowint8 fidelity --text book.txt --quantization rowint8 --quantization fp8-row --json fidelity.json
    """
    from rowint8.eval.quality import fidelity as job
    from rowint8.eval.quality import fidelity_setups
    from rowint8.eval.quantize.source import open_source
    from rowint8.eval.quantize.text import read_text, token_windows
    from rowint8.eval.report.quality import fidelity_table
    from rowint8.eval.results.schema import FidelityRow

    source = open_source(existing_model(model), trust_remote_code)
    chosen = fidelity_setups.choose(quantization)
    setups = [fidelity_setups.rounded_setup(source, name) for name in chosen]
    setups += [fidelity_setups.stored_setup(folder) for folder in checkpoint or ()]
    for name in fidelity_setups.ABLATED if ablate else ():
        setups += fidelity_setups.ablation_setups(source, name) if name in chosen else []
    tokens = token_windows(model, read_text(text), window, windows, trust_remote_code)
    shown = progress_bar("weights", len(setups) + 1, show=True)
    with Kept(json_file, FidelityRow, append) as kept, shown as advance:
        measured = job.Fidelity(model, fidelity_setups.original(source), tokens, trust_remote_code)
        advance()
        for row in job.measure(measured, setups, text.name, advance):
            kept.add([row])
    out.print(fidelity_table(kept.rows))


def agreement(
    model: Model = DEFAULT_FOLDER,
    dtype: Dtype = None,
    tensor_parallel_size: Ranks = 1,
    json_file: Json = None,
) -> None:
    """Compare the greedy tokens of the small engine and of vLLM, both with rowint8, on ten fixed prompts.

    Example: rowint8 agreement --json agreement.json
    """
    from rowint8.eval.quality import agreement as job
    from rowint8.eval.report.quality import agreement_table

    folder = existing_model(model)
    with err.status("both engines, ten prompts"):
        rows = job.compare(folder, arithmetic(dtype), tensor_parallel_size)
    out.print(agreement_table(rows))
    write(json_file, rows)


def arithmetic(dtype: str | None) -> str:
    """The dtype asked for, or this machine's default; raises EvalError where there is no such dtype."""
    from rowint8.eval.quality.suite import default_dtype

    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise EvalError(f"--dtype is {dtype}; accepted are bfloat16, float16 and float32")
    return dtype or default_dtype()


def existing_model(folder: Path) -> Path:
    """The folder; raises EvalError where it holds no model, or one whose weights are no original ones."""
    if not (folder / "config.json").is_file():
        raise EvalError(f"{folder} is not a model folder (no config.json); `rowint8 demo-model` makes one")
    refuse_quantized(folder, read_json(folder / "config.json"))
    return folder
