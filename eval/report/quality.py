"""What quality files say, as Markdown: results of lm-eval, and distances of distributions."""

from rowint8.eval.markdown import TBD, table
from rowint8.eval.quality.suite import backend_name, difference_text, value_text
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import FidelityRow, QualityRow


def quality_table(results: Results[QualityRow]) -> str:
    """The backends of each metric of each task below one another, in the file's order."""
    heading = ["task", "metric", "backend", "arithmetic", "questions", "value", "paired difference", "gained", "lost"]
    cases = list(dict.fromkeys((row.task, row.metric) for row in results.rows))
    ordered = sorted(results.rows, key=lambda row: cases.index((row.task, row.metric)))
    return table(heading, [_quality_cells(row) for row in ordered])


def _quality_cells(row: QualityRow) -> list[str]:
    case = [row.task, row.metric, backend_name(row), row.dtype, str(row.questions)]
    flips = ["" if count is None else str(count) for count in (row.gained, row.lost)]
    return [*case, value_text(row), difference_text(row), *flips]


def fidelity_table(results: Results[FidelityRow]) -> str:
    """One line a setup."""
    heading = ["setup", "text", "tokens", "perplexity", "d(nll)", "KL mean", "median", "p99", "max", "same top-1"]
    lines = []
    for row in results.rows:
        kl = [f"{value:.3g}" for value in (row.kl_mean, row.kl_median, row.kl_p99, row.kl_max)]
        nll = f"{row.nll_difference:+.5f} ± {row.nll_difference_stderr:.5f}"
        counts = [row.setup, row.text, str(row.tokens), f"{row.perplexity:.4f}", nll]
        lines.append([*counts, *kl, f"{row.same_top1:.2%}"])
    return table(heading, lines)


def quality_summary(results: Results[QualityRow] | None) -> str:
    """Each metric of each task without quantization, and what the other backends say differently."""
    if results is None:
        return TBD
    first = results.rows[0]
    others = [name for name in dict.fromkeys(map(backend_name, results.rows)) if name != backend_name(first)]
    cases: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        cells = cases.setdefault((f"{row.task} ({row.questions})", row.metric), [])
        cells.append(f"{row.value:.4f}" if row.difference is None else _with_flips(row))
    head = f"{results.environment.device}, {first.dtype}; paired differences with their standard errors, in brackets "
    head += "questions gained and lost.\n\n"
    return head + table(
        ["task (questions)", "metric", backend_name(first), *others], [[*case, *cells] for case, cells in cases.items()]
    )


def _with_flips(row: QualityRow) -> str:
    return difference_text(row) + (f" (+{row.gained} -{row.lost})" if row.gained is not None else "")


def fidelity_line(results: Results[FidelityRow] | None) -> str:
    """The ways of rounding on one line each; the layers that were rounded alone are in the report."""
    if results is None:
        return TBD
    lines = [
        [row.setup, f"{row.perplexity:.3f}", f"{1000 * row.kl_mean:.2f}", f"{row.same_top1:.1%}"]
        for row in results.rows
        if not row.setup.startswith("only ")
    ]
    first = results.rows[0]
    head = f"{first.tokens} tokens of {first.text} in windows of {first.window}, arithmetic in {first.dtype}.\n\n"
    return head + table(["weights", "perplexity", "KL, thousandths of a nat", "same likeliest token"], lines)
