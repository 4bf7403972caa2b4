"""The command `rowint8 bench kernels`."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from rowint8.eval.cli.output import Json, err, out, save, say, write
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import SHAPES, TOKENS, parse_tokens, select_shapes
from rowint8.eval.models import DEFAULT_MODEL

COMPILE_TOKENS = (1, 16, 128, 2048)


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"


def bench_kernels(
    shapes: Annotated[
        str,
        typer.Option(help=f"Comma-separated: {', '.join(name for name in SHAPES if '/' not in name)}; or MODEL/qkv."),
    ] = DEFAULT_MODEL,
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Comma-separated. Default: 1 to 8192 in powers of two; with --compile 1,16,128,2048."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the activations.")] = Dtype.bfloat16,
    peers: Annotated[bool, typer.Option("--peers", help="Also Marlin, Machete and gemlite, where installed.")] = False,
    humming: Annotated[
        bool, typer.Option("--humming", help="Also Humming, which compiles for minutes: give few shapes and tokens.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Also the operators in plain torch, eager and by torch.compile.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Time the operators on a CUDA GPU beside cuBLAS, other INT8 kernels and torch.compile.

    Example: rowint8 bench kernels --peers --shapes gate_up,o --json kernels.json
    """
    chosen = select_shapes(shapes)
    counts = parse_tokens(tokens) if tokens else COMPILE_TOKENS if compile_ else TOKENS
    import torch

    if not torch.cuda.is_available():
        raise EvalError("kernels are timed on a CUDA GPU; torch finds none here")
    from rowint8.eval.kernels.bench import KernelBench
    from rowint8.eval.kernels.inductor import MODES
    from rowint8.eval.kernels.timing import measure_ceilings
    from rowint8.eval.report.kernels import kernel_tables

    names = (["marlin", "machete", "gemlite"] if peers else []) + (["humming"] if humming else [])
    bench = KernelBench(getattr(torch, dtype.value), say, names, list(MODES) if compile_ else [])
    rows = []
    with err.status("ceilings") as status:
        ceilings = measure_ceilings()
        status.update("getting ready")
        for row in bench.rows(chosen, counts):
            rows.append(row)
            status.update(f"{row.op} {row.shape} M = {row.M}")
            _keep(json_file, rows, ceilings)
    for table in kernel_tables(rows, ceilings):
        out.print(table)
    write(json_file, rows, ceilings)


def _keep(path: Path | None, rows: list, ceilings) -> None:
    """Writes what is measured so far. The environment is looked up once, for the first row: that takes a second."""
    from rowint8.eval.results.files import read_results, write_results

    if path is None:
        return
    if len(rows) == 1:
        save(path, rows, ceilings)
    else:
        write_results(path, replace(read_results(path), rows=tuple(rows)))
