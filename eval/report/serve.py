"""Rows of `bench serve` as a table: a line a rate and setup."""

from collections.abc import Iterable

from rowint8.eval.results.schema import ServeRow
from rowint8.eval.tables import Column, Table

COLUMNS = [
    Column("file", ""),
    Column("requests/s", "req/s"),
    Column("setup", ""),
    Column("", "setup"),
    *(Column(f"{tokens} tokens", "") for tokens in ("prompt", "output")),
    *(Column(f"{metric} {p} ms", f"{metric} {p}") for metric in ("TTFT", "TPOT") for p in ("p50", "p99")),
    *(Column("", f"ITL {p}") for p in ("p50", "p99")),
    "tok/s",
    Column("goodput/s", ""),
    Column("", "good/s"),
]


def serve_table(rows: Iterable[tuple[str, ServeRow]]) -> Table:
    """A line for each row, given with the name of its file."""
    found = list(rows)
    first = found[0][1]
    return Table(
        COLUMNS,
        [_cells(file, row) for file, row in found],
        title=f"vllm serve: {first.prompt_tokens} prompt tokens, {first.output_tokens} output tokens; ms",
        note=f"good/s: requests per second with {_limits(first)}",
        words=2,
        grouped=True,
    )


def _cells(file: str, row: ServeRow) -> list[str]:
    setup = [f"{row.request_rate:g}", f"{row.engine} {row.setup}", row.setup]
    tokens = [str(row.prompt_tokens), str(row.output_tokens)]
    times = [f"{time[p]:.1f}" for time in (row.ttft_ms, row.tpot_ms, row.itl_ms) for p in ("p50", "p99")]
    return [
        file,
        *setup,
        *tokens,
        *times,
        f"{row.tok_s:.1f}",
        f"{row.goodput:.2f} ({_limits(row)})",
        f"{row.goodput:.2f}",
    ]


def _limits(row: ServeRow) -> str:
    return ", ".join(f"{name} <= {limit:g} ms" for name, limit in row.goodput_limits_ms.items())
