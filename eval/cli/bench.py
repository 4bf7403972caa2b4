"""The commands `rowint8 bench ...`: speed."""

from typing import Annotated, Optional

import typer

from rowint8.eval.cli.kernels import bench_chain, bench_kernels
from rowint8.eval.cli.options import (
    Config,
    Eager,
    ExpertParallel,
    Layers,
    Model,
    Repeats,
    Sequences,
    TensorParallelSize,
    Workloads,
)
from rowint8.eval.cli.output import Append, Json, Kept, say, warn_if_busy
from rowint8.eval.engines import speed
from rowint8.eval.engines.setups import SERVED, SETUPS, choose_setups, ladder, ladder_help, model_folder, vocab_size
from rowint8.eval.errors import EvalError

bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
bench.command("kernels")(bench_kernels)
bench.command("chain")(bench_chain)


@bench.command("vllm")
def bench_vllm(
    setups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"Comma-separated: {', '.join(SETUPS)}. Default: all."),
    ] = None,
    model: Model = None,
    config: Config = None,
    layers: Layers = None,
    tensor_parallel_size: TensorParallelSize = 1,
    enable_expert_parallel: ExpertParallel = False,
    workloads: Workloads = speed.VLLM_WORKLOADS,
    repeats: Repeats = 3,
    enforce_eager: Eager = False,
    json_file: Json = None,
    append: Append = False,
) -> None:
    """Time whole vLLM engines, offline: rowint8 beside bf16, fp8 and other 8-bit weights, each in a process of its own.

    Example: rowint8 bench vllm --setups bf16,rowint8,fp8 --json vllm.json

    Example: rowint8 bench vllm --config qwen3-30b-a3b --layers 24 --setups bf16,rowint8
    """
    from rowint8.eval.engines import vllm as job
    from rowint8.eval.report.vllm import setup_table, speed_table
    from rowint8.eval.results.schema import VllmRow

    names, sizes = _installed(choose_setups(setups)), speed.parse_workloads(workloads)
    warn_if_busy()
    kept = Kept(json_file, VllmRow, append)
    with model_folder(model, config, layers) as (folder, loading):
        requests = speed.make_requests(sizes, vocab_size(folder))
        parallel = tensor_parallel_size, enforce_eager, enable_expert_parallel
        llm = {**loading, **job.llm_arguments(folder, sizes, *parallel)}

        def run(name: str) -> list[VllmRow]:
            rows, line = job.measure_setup(name, llm, requests, repeats, dummy=bool(loading))
            say(line)
            return rows

        failed = kept.measure(names, run)
    kept.finish(failed, speed_table, setup_table)


@bench.command("serve")
def bench_serve(
    setups: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SERVED)}.")] = "bf16,rowint8,rowint8-a8,fp8",
    model: Model = None,
    config: Config = None,
    layers: Layers = None,
    tensor_parallel_size: TensorParallelSize = 1,
    rates: Annotated[str, typer.Option(help="Requests per second, comma-separated.")] = "4,8,16",
    seconds: Annotated[float, typer.Option(min=0, max=86_400, help="How long to send at each rate.")] = 20.0,
    prompt_tokens: Annotated[int, typer.Option(min=2, max=speed.MOST_TOKENS, help="Of each request.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, max=speed.MOST_TOKENS, help="Of each request.")] = 128,
    goodput: Annotated[str, typer.Option(help="Limits in ms: ttft, tpot, e2el.")] = "ttft:200,tpot:50",
    repeats: Repeats = 1,
    enforce_eager: Eager = False,
    json_file: Json = None,
    append: Append = False,
) -> None:
    """Measure `vllm serve` under load with vLLM's own client, one server a setup.

    Example: rowint8 bench serve --rates 8,32 --goodput ttft:200,tpot:20 --json serve.json
    """
    from rowint8.eval.engines import serve as job
    from rowint8.eval.report.serve import serve_table
    from rowint8.eval.results.schema import ServeRow

    names, sent_at = _installed(choose_setups(setups, SERVED)), job.parse_rates(rates, seconds)
    load = job.Load(prompt_tokens, output_tokens, seconds, job.parse_goodput(goodput))
    warn_if_busy()
    kept = Kept(json_file, ServeRow, append)
    with model_folder(model, config, layers, tokenizer=True) as (folder, loading):
        arguments = {**loading, **job.server_arguments(load, tensor_parallel_size, enforce_eager)}
        failed = kept.measure(names, lambda name: job.run_setup(name, folder, arguments, sent_at, load, repeats))
    by_rate = sorted(kept.rows, key=lambda row: row.request_rate)
    kept.finish(failed, lambda _: serve_table(by_rate))


@bench.command("engine")
def bench_engine(
    setups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"Comma-separated: {ladder_help()}. Default: all that run here."),
    ] = None,
    model: Model = None,
    config: Config = None,
    layers: Layers = None,
    workloads: Workloads = speed.ENGINE_WORKLOADS,
    sequences: Sequences = 0,
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
            setup, given = known[name], job.answerable(known[name].engine, requests)
            arguments = job.engine_arguments(setup.engine, folder, bool(loading), requests)
            result = speed.run_setup(setup, arguments, given, repeats, dummy=bool(loading))
            say(f"{name}: started in {result['start_s']:.0f} s")
            return job.setup_rows(name, setup.engine, given, result)

        failed = kept.measure(names, run)
    kept.finish(failed, ladder_table)


def _installed(names: list[str]) -> list[str]:
    """The setups that can run here; says which cannot."""
    from rowint8.eval.processes import require_package

    require_package("vllm", "run `pip install 'rowint8[vllm]'`")
    lacking = {name: reason for name in names if (reason := SETUPS[name].lacks())}
    for name, reason in lacking.items():
        say(f"without {name}: {reason}")
    if len(lacking) == len(names):
        raise EvalError("no setup of --setups can run here")
    return [name for name in names if name not in lacking]
