"""Rows of `bench serve` as a table: a line a rate and setup, medians over its runs."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from rowint8.eval.report.engine import where_line
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import ServeRow
from rowint8.eval.tables import Column, Table

_TIMES = [("TTFT", p) for p in ("p50", "p95", "p99")] + [("TPOT", p) for p in ("p50", "p99")]
COLUMNS = [
    Column("requests/s", "req/s"),
    Column("setup", ""),
    Column("", "setup"),
    *(Column(f"{tokens} tokens", "") for tokens in ("prompt", "output")),
    "runs",
    *(Column(f"{metric} {p} ms", f"{metric} {p}") for metric, p in _TIMES),
    "±",
    "tok/s",
    Column("goodput/s", ""),
    Column("", "good/s"),
]


def serve_table(rows: Iterable[ServeRow]) -> Table:
    """A line for the runs of a setup at a rate."""
    alike: dict[tuple, list[ServeRow]] = {}
    for row in rows:
        alike.setdefault((row.request_rate, row.setup, row.prompt_tokens, row.output_tokens), []).append(row)
    first = next(iter(alike.values()))[0]
    return Table(
        COLUMNS,
        [_cells(runs) for runs in alike.values()],
        title=f"vllm serve: {first.prompt_tokens} prompt tokens, {first.output_tokens} output tokens; ms",
        note=f"medians of the runs; ±: (largest - smallest) / median TTFT p99; good/s: requests per second with "
        f"{_limits(first)}",
        words=2,
        grouped=True,
    )


def serve_part(results: Results[ServeRow]) -> str:
    """The table in Markdown, with where and of what."""
    head = f"{where_line(results)} Medians of the runs; ±: (largest - smallest) / median TTFT p99."
    return f"{head}\n\n{serve_table(results.rows).markdown()}"


def _cells(runs: Sequence[ServeRow]) -> list[str]:
    row, p99 = runs[0], [run.ttft_ms["p99"] for run in runs]
    setup = [f"{row.request_rate:g}", f"{row.engine} {row.setup}", row.setup]
    sizes = [str(row.prompt_tokens), str(row.output_tokens), str(len(runs))]
    times = [_time(metric, p, runs) for metric, p in _TIMES]
    spread = f"{(max(p99) - min(p99)) / statistics.median(p99):.0%}" if len(runs) > 1 else "-"
    goodput = f"{_median(runs, lambda run: run.goodput):.2f}"
    tok_s = f"{_median(runs, lambda run: run.tok_s):.1f}"
    return [*setup, *sizes, *times, spread, tok_s, f"{goodput} ({_limits(row)})", goodput]


def _time(metric: str, percentile: str, runs: Sequence[ServeRow]) -> str:
    """ "-" in files without that percentile."""
    times = [getattr(run, f"{metric.lower()}_ms").get(percentile) for run in runs]
    return "-" if None in times else f"{statistics.median(times):.1f}"


def _median(runs: Sequence[ServeRow], value: Callable[[ServeRow], float]) -> float:
    return statistics.median(map(value, runs))


def _limits(row: ServeRow) -> str:
    return ", ".join(f"{name} <= {limit:g} ms" for name, limit in row.goodput_limits_ms.items())
