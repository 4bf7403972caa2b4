"""The commands `rowint8 bench kernels`, `rowint8 bench chain` and `rowint8 tune`: operators on a GPU."""

import math
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rowint8.baseline_engine.progress import progress_bar
from rowint8.eval.cli.output import Json, Kept, err, out, say, write
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import (
    CHAIN_COUNTS,
    EVERY_COUNT,
    EXPERTS,
    EXPERTS_COUNTS,
    FEW_COUNTS,
    INT8_FORMS,
    SHAPES,
    TOKENS,
    WEIGHT_OPS,
    parse_ops,
    parse_tokens,
    select_experts,
    select_shapes,
    shapes_with,
)
from rowint8.eval.models import DEFAULT_MODEL, MODELS
from rowint8.eval.writing import refuse_unwritable

if TYPE_CHECKING:
    from rowint8.eval.kernels.tune import Choice, Job
    from rowint8.eval.results.schema import KernelRow

COMPILE_TOKENS = (1, 16, 128, 2048)
_WEIGHT_ONLY = ",".join(WEIGHT_OPS)
_WRITE_EVERY_S = 10.0
"""Writing a file of a thousand rows takes a while, in which the card would cool."""
_COMPILING = 0.5
"""At most this part of the time for tuning is spent on compiling ahead."""


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"


Shapes = Annotated[
    str,
    typer.Option(help=f"Comma-separated: {', '.join(name for name in SHAPES if '/' not in name)}; or MODEL/qkv."),
]
Ops = Annotated[
    str,
    typer.Option(
        "--op",
        help=f"Comma-separated: {', '.join(WEIGHT_OPS)}; {', '.join(INT8_FORMS.values())} of INT8 tokens, which "
        "are timed with and without their rounding, beside vLLM's CUTLASS INT8 and FP8 where it is installed; or "
        f"experts alone, whose --shapes are {', '.join(EXPERTS)}.",
    ),
]
Activations = Annotated[Dtype, typer.Option(help="Dtype of the activations.")]
Tokens = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help=f"Comma-separated. Default: {len(EVERY_COUNT)} from 1 to 8192, every kind of remainder among them; "
        f"with --compile {','.join(map(str, COMPILE_TOKENS))}."
    ),
]
_SLOWLY = f"on {DEFAULT_MODEL}'s shapes, of the tokens {','.join(map(str, FEW_COUNTS))}"
Peers = Annotated[
    bool, typer.Option("--peers", help=f"Also Marlin and Machete, and gemlite {_SLOWLY}, where installed.")
]
Humming = Annotated[bool, typer.Option("--humming", help=f"Also Humming, which compiles for minutes, {_SLOWLY}.")]
AppendCells = Annotated[
    bool,
    typer.Option(
        "--append",
        help="Keep what the file holds of other shapes and tokens, measured on the same machine. Several processes, "
        "such as one a GPU, may append to one file at the same time.",
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Also the operators in plain torch, eager and by torch.compile.")
]
ChainTokens = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--tokens", help=f"Comma-separated. Default: {','.join(map(str, CHAIN_COUNTS))}."),
]
ChainLayers = Annotated[int, typer.Option("--layers", min=1, max=32, help=f"How many of {DEFAULT_MODEL}'s.")]
ModelFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--model", help="Instead the shapes of this model folder, on one GPU."),
]
UpTo = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Comma-separated: a tile is chosen up to each of them. Default: 1 to 8192 in powers of two."),
]
Minutes = Annotated[float, typer.Option(min=0.1, help="Stop after about this time; what is chosen by then counts.")]
Tiles = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", help="The file to write. Default: $ROWINT8_TILES or ~/.config/rowint8/tiles.json."),
]


def bench_kernels(
    shapes: Shapes = DEFAULT_MODEL,
    tokens: Tokens = None,
    op: Ops = _WEIGHT_ONLY,
    dtype: Activations = Dtype.bfloat16,
    peers: Peers = False,
    humming: Humming = False,
    compile_: Compile = False,
    json_file: Json = None,
    append: AppendCells = False,
) -> None:
    """Time the operators on a CUDA GPU beside cuBLAS, other INT8 kernels and torch.compile, in turns.

    Example: rowint8 bench kernels --peers --shapes gate_up,o --json kernels.json

    Example: rowint8 bench kernels --op linear_int8,swiglu_int8 --json kernels-int8.json

    Example: rowint8 bench kernels --op experts --peers --shapes qwen3-30b-a3b --json experts.json
    """
    if op == "experts":
        names = ",".join(EXPERTS) if shapes == DEFAULT_MODEL else shapes
        layers, counts = select_experts(names), parse_tokens(tokens) if tokens is not None else EXPERTS_COUNTS
        _require_gpu("experts are")
        import torch

        from rowint8.eval.kernels.experts_bench import ExpertsBench

        bench = ExpertsBench(getattr(torch, dtype.value), say, peers)
        return _time(bench.rows(layers, counts), json_file, append)
    ops = parse_ops(op)
    weight_only = shapes_with(select_shapes(shapes), lambda name: name in ops)
    int8 = shapes_with(select_shapes(shapes), lambda name: INT8_FORMS.get(name) in ops)
    if not weight_only and not int8:
        raise EvalError(f"--shapes {shapes} has nothing for --op {op}")
    counts = parse_tokens(tokens) if tokens is not None else COMPILE_TOKENS if compile_ else EVERY_COUNT
    _require_gpu("kernels are")
    import torch

    from rowint8.eval.kernels.bench import KernelBench
    from rowint8.eval.kernels.int8_bench import Int8Bench
    from rowint8.eval.kernels.plain import MODES

    names = (["marlin", "machete", "gemlite"] if peers else []) + (["humming"] if humming else [])
    number_format = getattr(torch, dtype.value)
    bench = KernelBench(number_format, say, names, list(MODES) if compile_ else [])
    int8_bench = Int8Bench(number_format, say)
    _time(chain(bench.rows(weight_only, counts), int8_bench.rows(int8, counts)), json_file, append)


def _time(rows: Iterator["KernelRow"], json_file: Path | None, append: bool) -> None:
    """Measures the rows, keeps them as they come and prints them."""
    from rowint8.eval.kernels.timing import measure_ceilings
    from rowint8.eval.report.kernels import kernel_tables, worst_table
    from rowint8.eval.results.schema import KernelRow

    kept = Kept(json_file, KernelRow, append, lambda row: (row.op, row.shape, row.M, row.dtype), _WRITE_EVERY_S)
    with kept, err.status("ceilings") as status:
        kept.ceilings = ceilings = measure_ceilings()
        status.update("getting ready")
        for row in rows:
            kept.add([row])
            status.update(f"{row.op} {row.shape} M = {row.M}")
    for table in (*kernel_tables(kept.rows, ceilings), worst_table(kept.rows)):
        out.print(table)


def bench_chain(
    tokens: ChainTokens = None,
    layers: ChainLayers = MODELS[DEFAULT_MODEL]["num_hidden_layers"],
    json_file: Json = None,
    append: AppendCells = False,
) -> None:
    """Time the products and norms of a model's layers, attention left out, in one CUDA graph: rowint8, with INT8 tokens
    too, beside bf16, and FP8, INT8 of both operands and Machete where vLLM is installed.

    Example: rowint8 bench chain --tokens 1,32,128,1100 --json chain.json
    """
    counts = parse_tokens(tokens) if tokens is not None else CHAIN_COUNTS
    _require_gpu("chains are")
    from rowint8.eval.kernels.chain import ChainBench
    from rowint8.eval.report.chain import chain_table
    from rowint8.eval.results.schema import ChainRow

    kept = Kept(json_file, ChainRow, append, lambda row: (row.model, row.layers, row.M, row.chain))
    with kept, err.status("weights") as status:
        for row in ChainBench(say, layers).rows(counts):
            kept.add([row])
            status.update(f"{row.chain} M = {row.M}")
    out.print(chain_table(kept.rows))


def _require_gpu(what: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise EvalError(f"{what} timed on a CUDA GPU; torch finds none here")


def tune(
    shapes: Shapes = DEFAULT_MODEL,
    model: ModelFolder = None,
    tokens: UpTo = None,
    minutes: Minutes = 10,
    tiles: Tiles = None,
    json_file: Json = None,
) -> None:
    """Find the fastest kernel tiles on this CUDA GPU, for a card that the shipped ones were not measured on.

    They are taken from then on wherever rowint8 runs as this user: in both engines and in `rowint8 bench kernels`.

    Example: rowint8 tune --model models/smollm2-135m-instruct --minutes 5
    """
    if not math.isfinite(minutes):
        raise EvalError(f"--minutes is {minutes}; give a finite number")
    from rowint8.eval.kernels import tune as job

    chosen = job.model_shapes(model) if model else select_shapes(shapes)
    counts = parse_tokens(tokens) if tokens is not None else TOKENS
    _require_gpu("tiles are")
    import torch

    start, card = time.monotonic(), torch.cuda.get_device_name()
    jobs = job.make_jobs(chosen, counts, torch.device("cuda"))
    if not jobs:
        raise EvalError(f"--shapes is {shapes}, which has no linear layer; accepted are names such as gate_up")
    choices = _choose_tiles(jobs, card, tiles, start, 60 * minutes)
    if not choices:
        raise EvalError(f"--minutes {minutes:g} was too short for a first choice; give more, or fewer --shapes")
    out.print(job.tune_table(choices, card))
    if len(choices) < len(jobs):
        missing = f"{len(jobs) - len(choices)} of {len(jobs)} choices are missing"
        err.print(f"[yellow]the time is over:[/yellow] {missing}; give more --minutes", highlight=False)
    write(json_file, [choice.row for choice in choices])


def _choose_tiles(jobs: Sequence["Job"], card: str, tiles: Path | None, start: float, seconds: float) -> list["Choice"]:
    """Chooses for as long as there is time, and writes the file of tiles after each choice."""
    import torch

    from rowint8.eval.kernels import tune as job
    from rowint8.kernels.tiles.user import read_tiles, tiles_file

    path = tiles or tiles_file()
    refuse_unwritable(path)
    try:
        found = read_tiles(path, card) if path.exists() else {}
    except ValueError as error:
        raise EvalError(str(error)) from None
    wanted = job.compilations(jobs)
    with progress_bar("compiling", len(wanted), show=True) as advance:
        job.compile_ahead(wanted, _COMPILING * seconds, advance)
    choices = []
    with progress_bar("timing", len(jobs), show=True) as advance:
        for choice in job.choose_tiles(jobs, seconds - (time.monotonic() - start), torch.device("cuda")):
            choices.append(choice)
            found.setdefault((choice.row.op, choice.row.N, choice.row.K), {})[choice.row.M] = choice.tile
            job.write_tiles(path, card, found)
            advance()
    if choices:
        say(f"wrote {path}")
    return choices
