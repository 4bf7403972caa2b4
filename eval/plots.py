"""The plots of the report, from results only: times of kernels and their ratios to the best other's, chains, tok/s over
batch and over setups, KL over bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.models import FORMATS
from rowint8.eval.results.files import Results
from rowint8.eval.results.roofline import limit_us, misses, ratio
from rowint8.eval.results.schema import Ceilings, ChainRow, FidelityRow, Generation, KernelRow
from rowint8.eval.writing import write_file

_MOST_SHAPES = 6
"""In a picture of kernels: a layer's, or what one can read."""
_LAYER = (4096, 4096)
"""The weight whose bits are counted: scales of a row or group cost more in narrower ones."""
_COLUMNS = 3
"""Panels of kernels beside one another."""
_SIDE = 4.2
"""Inches of the side of such a panel."""
_MANY_COUNTS = 20
"""From this many numbers of tokens on a heat map shows more than lines do."""
_HEAT = (0.5, 1.5)
"""Ratios with the strongest colours; those beyond have them too."""


def pictures(found: Mapping[str, Results]) -> dict[str, Callable[[Path], None]]:
    """File name, which ends in .svg, to what draws it there: those whose data exist."""
    drawn: dict[str, Callable[[], object]] = {}
    for stem, results in found.items():
        first, device = results.rows[0], results.environment.device
        shapes = {row.shape for row in results.rows if isinstance(row, KernelRow)}
        if results.ceilings and 0 < len(shapes) <= _MOST_SHAPES:
            drawn[f"{stem}.svg"] = partial(_kernels, results.rows, results.ceilings, device)
        if isinstance(first, KernelRow) and len({row.M for row in results.rows}) >= _MANY_COUNTS:
            drawn[f"{stem}-ratio.svg"] = partial(_ratios, results.rows, device)
        if isinstance(first, ChainRow) and any(row.ratio for row in results.rows):
            drawn[f"{stem}.svg"] = partial(_figure, partial(_chains, results.rows, device))
        if isinstance(first, FidelityRow):
            drawn[f"{stem}-kl.svg"] = partial(_figure, partial(_kl, results.rows))
        if isinstance(first, Generation):
            if len(ladder := [row for row in results.rows if row.batch == 1 and row.output_tokens > 1]) > 1:
                drawn[f"{stem}-setups.svg"] = partial(_figure, partial(_setups, ladder, device))
            swept = _widest_sweep(results.rows)
            if len({row.batch for row in swept}) > 1:
                drawn[f"{stem}-batch.svg"] = partial(_figure, partial(_batches, swept, device))
    return {name: partial(_save, draw) for name, draw in drawn.items()}


def _save(draw: Callable, path: Path) -> None:
    """Writes the figure that `draw` returns as SVG, the same bytes for the same data.

    Raises:
        EvalError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise EvalError("plots need matplotlib; run `pip install 'rowint8[plots]'`, or give --no-plots") from None
    figure, drawing = draw(), BytesIO()
    tight = "tight" if figure.legends else None  # a legend of all panels needs more room, or less
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rowint8"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None}, bbox_inches=tight)
    write_file(path, drawing.getvalue())


def _figure(draw: Callable):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure.subplots())
    return figure


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


def _chains(rows: Sequence[ChainRow], device: str, axes) -> None:
    """The time of each chain over bf16's against tokens, with the interval; ours bold, a line at 1."""
    chains: dict[str, list[ChainRow]] = {}
    for row in sorted(rows, key=lambda row: row.M):
        if row.ratio:
            chains.setdefault(row.chain, []).append(row)
    for label, alike in chains.items():
        ratios = [row.ratio for row in alike if row.ratio]
        bars = [[each.value - each.low for each in ratios], [each.high - each.value for each in ratios]]
        look = dict(lw=2.4, zorder=5) if label == "rowint8" else dict(lw=1.1)
        axes.errorbar(
            [row.M for row in alike], [each.value for each in ratios], bars, marker="o", ms=3, label=label, **look
        )
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    counts = [2**power for power in range(13) if 2**power <= max(row.M for row in rows)]
    axes.set_xticks(counts, list(map(str, counts)), fontsize=7)
    axes.set(xlabel="tokens", ylabel="time / bf16's")
    axes.set_title(f"{rows[0].layers} layers of {rows[0].model}, attention left out, {device}", fontsize=9)
    axes.legend(fontsize=7)


def _ratios(rows: Sequence[KernelRow], device: str):
    """A heat map, tokens against operators and shapes; the colour is rowint8's time over the best other's, and a cross
    marks the cells that miss."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    counts = sorted({row.M for row in rows})
    names = list(dict.fromkeys(_title(row).rpartition(",")[0] for row in rows))
    values = [[float("nan")] * len(counts) for _ in names]
    lost: list[tuple[int, int]] = []
    for row in rows:
        place = names.index(_title(row).rpartition(",")[0]), counts.index(row.M)
        values[place[0]][place[1]] = ratio(row) or float("nan")
        lost += [place] if misses(row) else []
    figure = Figure(figsize=(11, 1.7 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    norm = TwoSlopeNorm(1.0, *_HEAT)
    drawn = axes.pcolormesh(values, cmap="RdBu_r", norm=norm, edgecolors="white", linewidth=0.4)
    axes.plot([x + 0.5 for _, x in lost], [y + 0.5 for y, _ in lost], "kx", ms=4, mew=1.2)
    axes.set_xticks([x + 0.5 for x in range(len(counts))], list(map(str, counts)), rotation=90, fontsize=7.5)
    axes.set_yticks([y + 0.5 for y in range(len(names))], names, fontsize=7.5)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_title(
        f"rowint8's time / the best other's on {device}; crosses: certainly slower ({len(lost)} cells)", fontsize=10
    )
    figure.colorbar(drawn, ax=axes, extend="both", pad=0.01, aspect=30).ax.tick_params(labelsize=7.5)
    return figure


def _kernels(rows: Sequence[KernelRow], ceilings: Ceilings, device: str):
    """Every entry of the rows' `us` over M with the card's limit, one panel an operator and shape."""
    from matplotlib.figure import Figure

    panels: dict[str, list[KernelRow]] = {}
    for row in rows:
        panels.setdefault(_title(row), []).append(row)
    lines, columns = -(-len(panels) // _COLUMNS), min(len(panels), _COLUMNS)
    figure = Figure(figsize=(_SIDE * columns, _SIDE * lines), layout="constrained")
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
    counts = [row.M for row in rows if len(rows) < _MANY_COUNTS or row.M & (row.M - 1) == 0]
    axes.set_xticks(counts, list(map(str, counts)), rotation=90, fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds")
    axes.grid(True, which="both", alpha=0.25)
