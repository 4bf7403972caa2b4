"""The command `rowint8 profile`."""

from typing import Annotated, Any, Optional

import typer
from rich.console import Group

from rowint8.eval.cli.options import Config, Layers, Model
from rowint8.eval.cli.output import Append, Json, Kept, warn_if_busy
from rowint8.eval.engines.setups import choose_setups, model_folder
from rowint8.eval.engines.speed import MOST_TOKENS


def profile(
    setups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Comma-separated, as of `rowint8 bench engine`. Default: all that run here."),
    ] = None,
    model: Model = None,
    config: Config = None,
    layers: Layers = None,
    batches: Annotated[str, typer.Option(help="Requests that decode together, comma-separated.")] = "1,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Of each request.")] = 128,
    sampling: Annotated[str, typer.Option(help="Comma-separated: greedy, top-p (0.95 at temperature 1).")] = "greedy",
    steps: Annotated[int, typer.Option(min=2, max=MOST_TOKENS, help="That count, with and without the profiler.")] = 32,
    json_file: Json = None,
    append: Append = False,
) -> None:
    """Say where a decode step's time goes: kernels by what they do, gaps between them, the host, and the card's limit.

    Example: rowint8 profile --setups bf16-graph,int8-fused,vllm-rowint8 --batches 1,32 --json profile.json
    """
    import torch

    from rowint8.eval.engines import profile as job
    from rowint8.eval.report.profile import console_tables
    from rowint8.eval.results.schema import ProfileRow

    known: dict[str, Any] = job.setups(torch.cuda.is_available())
    names = choose_setups(setups, known)
    cases = job.parse_batches(batches, prompt_tokens, steps), job.parse_samplings(sampling), prompt_tokens, steps
    warn_if_busy()
    kept = Kept(json_file, ProfileRow, append)
    with model_folder(model, config, layers, tokenizer=True) as (folder, loading):
        failed = kept.measure(names, lambda name: job.run_setup(name, known[name], folder, bool(loading), *cases))
    kept.finish(failed, lambda rows: Group(*console_tables(rows)))
