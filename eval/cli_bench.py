"""The commands `rowint8 bench ...`: speed."""

from typing import Annotated, Optional

import typer

from rowint8.eval.cli_output import Json, err, out, save, write
from rowint8.eval.errors import EvalError

bench = typer.Typer(help="Measure speed.", no_args_is_help=True)


@bench.command("kernels")
def bench_kernels(
    shapes: Annotated[Optional[str], typer.Option(help="Comma-separated: qkv, o, gate_up, down. Default: all.")] = None,  # noqa: UP045
    peers: Annotated[bool, typer.Option(help="Also Marlin, Machete and gemlite, where they are installed.")] = False,
    json_file: Json = None,
) -> None:
    """Time the operators on a CUDA GPU beside cuBLAS in bf16, with Llama-3.1-8B's shapes and 1 to 8192 tokens.

    Example: rowint8 bench kernels --peers --shapes gate_up,o --json kernels.json
    """
    import torch

    from rowint8.eval import bench_kernels as job

    if not torch.cuda.is_available():
        raise EvalError("kernels are timed on a CUDA GPU; torch finds none here")
    chosen = shapes.split(",") if shapes else list(job.SHAPES)
    if unknown := [shape for shape in chosen if shape not in job.SHAPES]:
        raise EvalError(f"--shapes has {', '.join(unknown)}; accepted are {', '.join(job.SHAPES)}")
    rows = []
    with err.status("ceilings") as status:
        ceilings = job.measure_ceilings()

        def announce(message: str) -> None:
            status.update(message)
            if message.startswith("without"):
                err.print(message)

        for row in job.bench(chosen, job.TOKENS, announce, peers):
            rows.append(row)
            status.update(f"{row.op} {row.shape} M = {row.M}")
            if json_file:
                save(json_file, rows, ceilings)  # an interrupted run keeps what it measured
    out.print(job.kernel_table(rows, ceilings))
    write(json_file, rows, ceilings)
