"""The command `rowint8 bench engine`."""

from typing import Annotated, Optional

import typer

from rowint8.eval.cli.options import Config, Layers, Model, Repeats, Workloads
from rowint8.eval.cli.output import Append, Json, Kept, say, warn_if_busy
from rowint8.eval.engines import speed
from rowint8.eval.engines.setups import choose_setups, ladder, ladder_help, model_folder, vocab_size


def bench_engine(
    setups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"Comma-separated: {ladder_help()}. Default: all that run here."),
    ] = None,
    model: Model = None,
    config: Config = None,
    layers: Layers = None,
    workloads: Workloads = speed.ENGINE_WORKLOADS,
    sequences: Annotated[
        int, typer.Option(min=0, help="Of the throughput workload (100 to 1024 tokens in and out); 0 leaves it out.")
    ] = 0,
    repeats: Repeats = 3,
    json_file: Json = None,
    append: Append = False,
) -> None:
    """Time the small engine, rung by rung, and vLLM (on a CPU transformers) beside it, each in a process of its own.

    Example: rowint8 bench engine --sequences 256 --json engine.json
    """
    import torch

    from rowint8.eval.engines import baseline as job
    from rowint8.eval.report.engine import ladder_table
    from rowint8.eval.results.schema import EngineRow

    known = ladder(torch.cuda.is_available())
    names, sizes = choose_setups(setups, known), speed.parse_workloads(workloads)
    warn_if_busy()
    kept = Kept(json_file, EngineRow, append)
    with model_folder(model, config, layers) as (folder, loading):
        requests = speed.make_requests(sizes, vocab_size(folder), sequences)

        def run(name: str) -> list[EngineRow]:
            setup, dummy = known[name], bool(loading)
            arguments = job.engine_arguments(setup.engine, folder, dummy, requests)
            result = speed.run_setup(setup, arguments, requests, repeats, dummy)
            say(f"{name}: started in {result['start_s']:.0f} s")
            return job.setup_rows(name, setup.engine, requests, result)

        failed = kept.measure(names, run)
    kept.finish(failed, ladder_table)
