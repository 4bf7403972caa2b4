"""Plots of the report beside the kernels': tok/s over batch, KL over bits, the ladder of setups; from results only."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.models import FORMATS
from rowint8.eval.plot_kernels import plot_kernels
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import FidelityRow, Generation, KernelRow

_MOST_SHAPES = 6
"""In a picture of kernels: a layer's, or what one can read."""
_LAYER = (4096, 4096)
"""The weight whose bits are counted: scales of a row or group cost more in narrower ones."""


def pictures(found: Mapping[str, Results]) -> dict[str, Callable[[Path], None]]:
    """File name to what draws it there: those whose data exist."""
    drawn: dict[str, Callable[[Path], None]] = {}
    for stem, results in found.items():
        first = results.rows[0]
        shapes = {row.shape for row in results.rows if isinstance(row, KernelRow)}
        if results.ceilings and 0 < len(shapes) <= _MOST_SHAPES:
            drawn[f"{stem}.svg"] = partial(plot_kernels, results)
        if isinstance(first, FidelityRow):
            drawn[f"{stem}-kl.svg"] = partial(_save, partial(_kl, results.rows))
        if isinstance(first, Generation):
            if len(ladder := [row for row in results.rows if row.batch == 1 and row.output_tokens > 1]) > 1:
                drawn[f"{stem}-setups.svg"] = partial(_save, partial(_setups, ladder, results.environment.device))
            swept = _widest_sweep(results.rows)
            if len({row.batch for row in swept}) > 1:
                drawn[f"{stem}-batch.svg"] = partial(_save, partial(_batches, swept, results.environment.device))
    return drawn


def _widest_sweep(rows: Sequence[Generation]) -> list[Generation]:
    """The rows of the prompt and output lengths that were measured at most batch sizes."""
    sweeps: dict[tuple[int, int], list[Generation]] = {}
    for row in rows:
        sweeps.setdefault((row.prompt_tokens, row.output_tokens), []).append(row)
    return max(sweeps.values(), key=lambda alike: len({row.batch for row in alike}))


def _batches(rows: Sequence[Generation], device: str, axes) -> None:
    setups: dict[str, list[Generation]] = {}
    for row in rows:
        setups.setdefault(f"{row.engine} {row.setup}", []).append(row)
    for label, alike in setups.items():
        alike.sort(key=lambda row: row.batch)
        axes.plot([row.batch for row in alike], [row.tok_s for row in alike], marker="o", ms=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="tok/s")
    axes.set_title(f"{rows[0].prompt_tokens} prompt and {rows[0].output_tokens} output tokens, {device}", fontsize=9)
    axes.legend(fontsize=7)


def _setups(rows: Sequence[Generation], device: str, axes) -> None:
    labels = [f"{row.engine} {row.setup}, {row.prompt_tokens} + {row.output_tokens}" for row in rows]
    bars = axes.barh(labels, [row.tok_s for row in rows])
    axes.bar_label(bars, [f"{row.tok_s:.1f} ({row.tok_s / rows[0].tok_s:.2f}x)" for row in rows], fontsize=7, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("tok/s, one request; x: over the first line")
    axes.set_title(device, fontsize=9)


def _kl(rows: Sequence[FidelityRow], axes) -> None:
    n, k = _LAYER
    for row in rows:
        if row.setup.startswith("only ") or row.kl_mean == 0:  # parts of a model; bf16 of a bf16 model
            continue
        bits = 8 * FORMATS.get(row.setup, FORMATS["rowint8"])(n, k) / (n * k)
        axes.plot([bits], [row.kl_mean], marker="o")
        axes.annotate(row.setup, (bits, row.kl_mean), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(yscale="log", xlabel=f"bits a weight, scales included, [{n}, {k}]", ylabel="mean KL, nats")


def _save(draw: Callable, path: Path) -> None:
    """Draws one panel into a file.

    Raises:
        EvalError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise EvalError("plots need matplotlib; run `pip install 'rowint8[plots]'`, or give --no-plots") from None
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure.subplots())
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rowint8"}):
            figure.savefig(path, metadata={"Date": None})
    except OSError as error:
        raise EvalError(f"cannot write {path}: {error.strerror}") from None
