"""The command `rowint8 bench engine`."""

import json
from typing import Annotated, Any, Optional

import typer

from rowint8.eval.cli.options import Config, Layers, Model
from rowint8.eval.cli.output import Append, Json, Kept, say, warn_if_busy


def bench_engine(
    setups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Comma-separated: bf16-eager, bf16-compile, bf16-graph (GPU), int8, int8-fused, "
            "int8-fused-decode-graphs (GPU), int8-fused-lm-head, vllm-bf16, vllm-rowint8 (GPU), "
            "transformers-bf16 (CPU). Default: all that run here."
        ),
    ] = None,
    model: Model = None,
    config: Config = None,
    layers: Layers = None,
    workloads: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Comma-separated BATCHxPROMPTxOUTPUT. Default: 1x128x128,8x128x128,32x128x128."),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=0, help="Of the throughput workload (100 to 1024 tokens in and out); 0 leaves it out.")
    ] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of a workload; medians count.")] = 3,
    json_file: Json = None,
    append: Append = False,
) -> None:
    """Time the small engine, rung by rung, and vLLM (on a CPU transformers) beside it, each in a process of its own.

    Example: rowint8 bench engine --sequences 256 --json engine.json
    """
    import torch

    from rowint8.eval.engines import baseline as job
    from rowint8.eval.engines.setups import choose_setups, model_folder
    from rowint8.eval.engines.vllm import parse_workloads
    from rowint8.eval.results.schema import EngineRow

    known: dict[str, Any] = job.setups(torch.cuda.is_available())
    names = choose_setups(setups, known)
    sizes = parse_workloads(workloads or job.DEFAULT_WORKLOADS)
    warn_if_busy()
    kept = Kept(json_file, EngineRow, append)
    with model_folder(model, config, layers) as (folder, loading):
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        requests = [job.uniform_requests(size, vocab_size) for size in sizes]
        requests += [job.throughput_requests(vocab_size, sequences)] if sequences else []

        def run(name: str) -> list[EngineRow]:
            result = job.run_setup(known[name], folder, bool(loading), requests, repeats)
            say(f"{name}: started in {result['start_s']:.0f} s")
            return job.setup_rows(name, known[name].engine, requests, result)

        failed = kept.measure(names, run)
    kept.finish(failed, job.ladder_table)
