"""Kernel times over the number of tokens, one panel an operator and shape, with the card's limit; from results only."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.table import limit_us
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import Ceilings, KernelRow

_COLUMNS = 3
_SIZE = 4.2
"""Inches of a panel's side."""


def plot_kernels(results: Results[KernelRow], path: Path) -> None:
    """Draws every entry of the rows' `us` over M, both axes logarithmic, into a file of the path's kind (.svg, .png).

    Raises:
        EvalError: matplotlib is not installed, the results have no ceilings, or the file cannot be written.
    """
    if results.ceilings is None:
        raise EvalError("these results have no ceilings, so no limit can be drawn; `rowint8 bench kernels` writes them")
    try:
        import matplotlib
    except ImportError:
        raise EvalError("plots need matplotlib; run `pip install 'rowint8[plots]'`") from None
    matplotlib.use("agg")
    figure = _figure(results.rows, results.ceilings, results.environment.device)
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rowint8"}):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise EvalError(f"cannot write {path}: {error}") from None


def _figure(rows: Sequence[KernelRow], ceilings: Ceilings, device: str):
    from matplotlib.figure import Figure

    panels: dict[str, list[KernelRow]] = {}
    for row in rows:
        panels.setdefault(_title(row), []).append(row)
    lines = -(-len(panels) // _COLUMNS)
    columns = min(len(panels), _COLUMNS)
    figure = Figure(figsize=(_SIZE * columns, _SIZE * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    styles = _styles(rows)
    for axes, (title, part) in zip(grid, panels.items(), strict=False):
        _panel(axes, title, sorted(part, key=lambda row: row.M), ceilings, styles)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"Time of a call on {device}")
    return figure


def _title(row: KernelRow) -> str:
    sizes = f"[{row.N}]" if row.op == "add_rms_norm" else f"[{row.N}, {row.K}]"
    return f"{row.op} {row.shape} {sizes}, {row.dtype}"


def _styles(rows: Sequence[KernelRow]) -> dict[str, dict]:
    """One look a name, the same in every panel; rowint8 stands out."""
    others = [name for name in dict.fromkeys(name for row in rows for name in row.us) if name != "rowint8"]
    looks = {
        name: dict(color=f"C{1 + i % 9}", marker="os^Dv"[i // 9 % 5], ms=3, lw=1.1) for i, name in enumerate(others)
    }
    return {"rowint8": dict(color="C0", marker="o", ms=4.5, lw=2.4, zorder=5)} | looks


def _panel(axes, title: str, rows: Sequence[KernelRow], ceilings: Ceilings, styles: dict[str, dict]) -> None:
    for name in styles:
        measured = [row for row in rows if name in row.us]
        if measured:
            axes.plot([row.M for row in measured], [row.us[name] for row in measured], label=name, **styles[name])
    between = sorted({round(rows[0].M * (rows[-1].M / rows[0].M) ** (step / 100)) for step in range(101)})
    limit = [limit_us(replace(rows[0], M=m), ceilings) for m in between]
    axes.plot(between, limit, color="black", ls="--", lw=1.2, label="limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    fastest = min(min(row.us.values()) for row in rows)
    axes.set_ylim(bottom=max(min(limit), fastest / 8) * 0.8)  # the limit of a norm of one row is far below any launch
    axes.set_xticks([row.M for row in rows], [str(row.M) for row in rows], rotation=90, fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds")
    axes.grid(True, which="both", alpha=0.25)
