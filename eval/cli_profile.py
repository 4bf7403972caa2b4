"""The command `rowint8 profile`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rowint8.eval.cli_output import Append, Json, Kept, err, out
from rowint8.eval.errors import EvalError


def profile(
    setups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Comma-separated, as of `rowint8 bench engine`. Default: all that run here."),
    ] = None,
    model: Annotated[Optional[Path], typer.Option(help="A model folder, instead of random weights.")] = None,  # noqa: UP045
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Shape of the random weights: llama-3.1-8b, tiny, ... or a config.json. Default: the first."),
    ] = None,
    layers: Annotated[Optional[int], typer.Option(min=1, help="Depth of the random weights, instead of all.")] = None,  # noqa: UP045
    batches: Annotated[str, typer.Option(help="Requests that decode together, comma-separated.")] = "1,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 128,
    sampling: Annotated[str, typer.Option(help="Comma-separated: greedy, top-p (0.95 at temperature 1).")] = "greedy",
    steps: Annotated[int, typer.Option(min=2, help="That count, with and without the profiler.")] = 32,
    json_file: Json = None,
    append: Append = False,
) -> None:
    """Say where a decode step's time goes: kernels by what they do, gaps between them, the host, and the card's limit.

    Example: rowint8 profile --setups bf16-graph,int8-fused,vllm-rowint8 --batches 1,32 --json profile.json
    """
    import torch

    from rowint8.eval import step_profile as job
    from rowint8.eval.bench_engine import row_setup
    from rowint8.eval.bench_serve import write_tokenizer
    from rowint8.eval.bench_vllm_setups import choose_setups, model_folder
    from rowint8.eval.console import busy_warning
    from rowint8.eval.profile_tables import console_tables
    from rowint8.eval.schema import ProfileRow

    known: dict[str, Any] = job.setups(torch.cuda.is_available())
    names = choose_setups(setups, known)
    cases = job.parse_batches(batches), job.parse_samplings(sampling), prompt_tokens, steps
    if warning := busy_warning():
        err.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    kept = Kept(json_file, ProfileRow, append, [row_setup(name) for name in names])
    failed = []
    with model_folder(model, config, layers) as (folder, loading):
        if model is None:
            write_tokenizer(folder)
        for number, name in enumerate(names, 1):
            try:
                with err.status(f"{name} ({number} of {len(names)})"):
                    kept.add(job.run_setup(name, known[name], folder, bool(loading), *cases))
            except EvalError as error:
                failed.append(name)
                err.print(f"{name}: {error}", markup=False, highlight=False, soft_wrap=True)
    for table in console_tables(kept.rows) if kept.rows else ():
        out.print(table)
    kept.close()
    if failed:
        raise EvalError(f"failed: {', '.join(failed)}; why is said above")
