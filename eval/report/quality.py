"""What quality files say as tables: results of lm-eval, distances of distributions, tokens that agree."""

from collections.abc import Sequence
from itertools import groupby

from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import AgreementRow, FidelityRow, QualityRow
from rowint8.eval.tables import Column, Table, model_of

_QUALITY = [
    Column("task", ""),
    *("metric", "backend"),
    *(Column("arithmetic", ""), Column("questions", "")),
    "value",
    Column("paired difference", "difference"),
    *("gained", "lost"),
]
_FIDELITY = [
    Column("setup", "weights"),
    *(Column("text", ""), Column("tokens", "")),
    Column("perplexity", "ppl"),
    *("d(nll)", "KL mean", Column("median", ""), "p99", Column("max", "")),
    Column("same top-1", "same top"),
]


def quality_table(rows: Sequence[QualityRow]) -> Table:
    """The backends of each metric of each task below one another, in the order of the rows."""
    cases = list(dict.fromkeys((row.task, row.metric) for row in rows))
    ordered = sorted(rows, key=lambda row: cases.index((row.task, row.metric)))
    first = ordered[0]
    return Table(
        _QUALITY,
        [_quality_cells(row) for row in ordered],
        title=f"{first.task}: {first.questions} questions, arithmetic in {first.dtype}",
        note=f"difference: paired, question by question, from {backend_name(first)}; gained, lost: answers that flip",
        words=2,
        grouped=True,
    )


def quality_tables(rows: Sequence[QualityRow]) -> list[Table]:
    """For the console: one table a task."""
    ordered = sorted(rows, key=lambda row: (row.task, row.metric))  # stable: backends stay in their order
    return [quality_table(list(group)) for _, group in groupby(ordered, key=lambda row: row.task)]


def _quality_cells(row: QualityRow) -> list[str]:
    case = [row.task, row.metric, backend_name(row), row.dtype, str(row.questions)]
    flips = ["" if count is None else str(count) for count in (row.gained, row.lost)]
    return [*case, value_text(row), difference_text(row), *flips]


def backend_name(row: QualityRow) -> str:
    """The backend's name on the command line, such as "vllm-rowint8"."""
    return row.engine if row.setup == "unquantized" else f"{row.engine}-{row.setup}"


def value_text(row: QualityRow) -> str:
    """The value and its standard error, where there is one."""
    return f"{row.value:.4f}" + ("" if row.stderr is None else f" ± {row.stderr:.4f}")


def difference_text(row: QualityRow) -> str:
    """The paired difference and its standard error; empty where there is none."""
    return "" if row.difference is None else f"{row.difference:+.4f} ± {row.difference_stderr or 0.0:.4f}"


def quality_summary(results: Results[QualityRow]) -> str:
    """Each metric of each task without quantization, and what the other backends say differently, in Markdown."""
    first = results.rows[0]
    backends = list(dict.fromkeys(map(backend_name, results.rows)))
    cases: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        cells = cases.setdefault((f"{row.task} ({row.questions})", row.metric), [])
        cells.append(f"{row.value:.4f}" if row.difference is None else _with_flips(row))
    head = f"{model_of(results.command)}, {results.environment.device}, {first.dtype}; paired differences with their "
    head += "standard errors, in brackets questions gained and lost.\n\n"
    lines = [[*case, *cells] for case, cells in cases.items()]
    return head + Table(["task (questions)", "metric", *backends], lines).markdown()


def _with_flips(row: QualityRow) -> str:
    return difference_text(row) + (f" (+{row.gained} -{row.lost})" if row.gained is not None else "")


def fidelity_table(rows: Sequence[FidelityRow]) -> Table:
    """A line a setup."""
    first, lines = rows[0], []
    for row in rows:
        kl = [f"{value:.3g}" for value in (row.kl_mean, row.kl_median, row.kl_p99, row.kl_max)]
        nll = f"{row.nll_difference:+.5f} ± {row.nll_difference_stderr:.5f}"
        counts = [row.setup, row.text, str(row.tokens), f"{row.perplexity:.4f}", nll]
        lines.append([*counts, *kl, f"{row.same_top1:.2%}"])
    return Table(
        _FIDELITY,
        lines,
        title=f"{first.text}: {first.tokens} tokens in windows of {first.window}, arithmetic in {first.dtype}",
        note="KL from the unquantized model, nats; d(nll): paired, ± standard error; "
        "same top: likeliest token is the same",
    )


def fidelity_line(results: Results[FidelityRow]) -> str:
    """The ways of rounding on one line each, in Markdown, but for layers that were rounded alone."""
    lines = [
        [row.setup, f"{row.perplexity:.3f}", f"{1000 * row.kl_mean:.2f}", f"{row.same_top1:.1%}"]
        for row in results.rows
        if not row.setup.startswith("only ")
    ]
    first = results.rows[0]
    head = f"{model_of(results.command)}; {first.tokens} tokens of {first.text} in windows of {first.window}, "
    head += f"arithmetic in {first.dtype}.\n\n"
    return head + Table(["weights", "perplexity", "KL, thousandths of a nat", "same likeliest token"], lines).markdown()


def fidelity_section(results: Results[FidelityRow]) -> str:
    """`fidelity_line`, and what each kind of layer costs that was rounded alone, on one line."""
    alone = [row for row in results.rows if row.setup.startswith("only ")]
    told = ", ".join(f"{row.setup.removeprefix('only ')} {1000 * row.kl_mean:.2f}" for row in alone)
    return fidelity_line(results) + (f"\nOne kind of layer rounded alone, KL: {told}.\n" if alone else "")


def agreement_table(rows: Sequence[AgreementRow]) -> Table:
    """For the console: a line a prompt."""
    whole = sum(row.agreed == row.tokens for row in rows)
    gaps = ["" if row.logprob_gap is None else f"{row.logprob_gap:.4f}" for row in rows]
    return Table(
        ["prompt", "tokens agreed", "gap"],
        [[row.prompt, f"{row.agreed} / {row.tokens}", gap] for row, gap in zip(rows, gaps, strict=True)],
        title=f"greedy tokens, {compared(rows)}, both rowint8 in {rows[0].dtype}",
        note=f"{whole} of {len(rows)} prompts agree on all {rows[0].tokens} tokens; "
        "gap: between the two candidates where they part, in vLLM's log-probabilities",
    )


def agreement_section(results: Results[AgreementRow]) -> str:
    """A line a prompt in Markdown, with which engines, where and in which arithmetic."""
    where = f"{compared(results.rows)}, {results.environment.device}, {results.rows[0].dtype}"
    return f"{where}\n\n{agreement_table(results.rows).markdown()}"


def agreement_cells(stem: str, results: Results[AgreementRow]) -> list[str]:
    """A file as a line of the documents."""
    rows = results.rows
    gaps = ", ".join(f"{row.logprob_gap:.3f}" for row in rows if row.logprob_gap is not None)
    same = f"{sum(row.agreed == row.tokens for row in rows)} of {len(rows)}, {rows[0].tokens} tokens each"
    return [stem, compared(rows), f"{results.environment.device}, {rows[0].dtype}", same, gaps]


def compared(rows: Sequence[AgreementRow]) -> str:
    """Which two engines the rows compare."""
    ranks = rows[0].tensor_parallel_size
    return "baseline engine against vLLM" if ranks == 1 else f"vLLM on {ranks} ranks against vLLM on one"
