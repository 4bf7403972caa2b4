"""The commands `rowint8 bench ...`: speed."""

import typer

from rowint8.eval.cli import bench_engine as cli_bench_engine
from rowint8.eval.cli import bench_kernels as cli_bench_kernels
from rowint8.eval.cli import bench_vllm as cli_bench_vllm

bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
bench.command("kernels")(cli_bench_kernels.bench_kernels)
bench.command("vllm")(cli_bench_vllm.bench_vllm)
bench.command("serve")(cli_bench_vllm.bench_serve)
bench.command("engine")(cli_bench_engine.bench_engine)
