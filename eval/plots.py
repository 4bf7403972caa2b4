"""The plots of the report, from results only: engines' speed over bf16's, kernels' ratios to the best other's, chains,
and KL of each way of rounding."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.results.files import Results
from rowint8.eval.results.roofline import misses, ratio
from rowint8.eval.results.schema import ChainRow, FidelityRow, Generation, KernelRow, Measured
from rowint8.eval.tables import model_of
from rowint8.eval.writing import write_file

_MANY_COUNTS = 20
"""From this many numbers of tokens on a heat map shows more than lines do."""
_CROWDED = 12
"""From more names on an axis on, they are turned."""
_HEAT = (0.5, 1.5)
"""Ratios with the strongest colours; those beyond have them too."""


def pictures(found: Mapping[str, Results]) -> dict[str, Callable[[Path], None]]:
    """File name, which ends in .svg, to what draws it there: those whose data exist."""
    drawn: dict[str, Callable[[], object]] = {}
    for stem, results in found.items():
        first, device = results.rows[0], results.environment.device
        if isinstance(first, KernelRow) and len({row.M for row in results.rows}) >= _MANY_COUNTS:
            drawn[f"{stem}-ratio.svg"] = partial(_ratios, results.rows, device)
        if isinstance(first, ChainRow) and any(row.ratio for row in results.rows):
            drawn[f"{stem}.svg"] = partial(_figure, partial(_chains, results.rows, device))
        if isinstance(first, FidelityRow) and any(row.kl_mean > 0 for row in results.rows):
            drawn[f"{stem}-kl.svg"] = partial(_figure, partial(_kl, results))
        if isinstance(first, Generation) and len(_compared(results.rows)) > 1:
            drawn[f"{stem}-batch.svg"] = partial(_figure, partial(_speed, results))
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
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rowint8"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    write_file(path, drawing.getvalue())


def _figure(draw: Callable, size: tuple[float, float] = (8.3, 4.6)):
    """About 800 pixels wide, at a page's 96 an inch. The ground is white, so that a dark page can show it too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    return figure


def _base(rows: Sequence[Generation]) -> str:
    """The setup that ratios are taken to: vLLM's bf16, else the first of bf16."""
    names = [f"{row.engine} {row.setup}" for row in rows if row.setup.startswith("bf16")]
    return "vllm bf16" if "vllm bf16" in names else next(iter(names), "")


def _compared(rows: Sequence[Generation]) -> dict[tuple[int, int, int], Generation]:
    """Sizes to the base's row: those that another setup has too, decoding by batch, then prompts alone by tokens."""
    base = _base(rows)
    bases = {row.size: row for row in rows if f"{row.engine} {row.setup}" == base}
    others = {row.size for row in rows if f"{row.engine} {row.setup}" != base}
    return {size: bases[size] for size in sorted(bases.keys() & others, key=lambda size: (_is_prompt(size), size))}


def _is_prompt(size: tuple[int, int, int]) -> bool:
    return size[2] <= 2


def _speed(results: Results[Generation], axes) -> None:
    """The base's time a token, of prompts its TTFT, over each setup's; ours bold, bars for the repeats' spread."""
    rows, bases = results.rows, _compared(results.rows)
    prompts = sum(map(_is_prompt, bases))
    places = {size: place + 0.6 * _is_prompt(size) for place, size in enumerate(bases)}
    setups: dict[str, list[Generation]] = {}
    for row in rows:
        if row.size in bases and f"{row.engine} {row.setup}" != _base(rows):
            setups.setdefault(f"{row.engine} {row.setup}", []).append(row)
    for number, (label, alike) in enumerate(setups.items()):
        shift = 0.06 * (number - (len(setups) - 1) / 2)
        _draw_setup(axes, label, alike, bases, {size: place + shift for size, place in places.items()})
    axes.axhline(1.0, color="black", lw=1)
    if 0 < prompts < len(bases):
        axes.axvline(len(bases) - prompts - 0.2, color="grey", lw=0.6)
    names = [f"{batch} x {prompt}" if _is_prompt((batch, prompt, n)) else f"{batch}" for batch, prompt, n in places]
    crowded = len(names) > _CROWDED
    axes.set_xticks(list(places.values()), names, fontsize=9, rotation=60 if crowded else 0)
    axes.set_ylim(0, None)
    axes.grid(axis="y", lw=0.4, alpha=0.6)
    axes.set_xlabel(
        "requests that decode" + (" | prompts: requests x tokens, until the first token" if prompts else "")
    )
    axes.set_ylabel(f"speed over {_label(_base(rows))}'s")
    axes.set_title(_where(results), fontsize=10)
    axes.legend(fontsize=9, ncols=2, loc="lower left")


def _draw_setup(axes, label: str, rows: Sequence[Generation], bases: Mapping, places: Mapping) -> None:
    """A line through the batches that decode; points for prompts, which are no such series."""
    for prompt in (False, True):
        part = sorted((row for row in rows if _is_prompt(row.size) == prompt), key=lambda row: places[row.size])
        ratios = [_ms(bases[row.size]) / _ms(row) for row in part]
        bars = [value * _spread(row, bases[row.size]) / 2 for value, row in zip(ratios, part, strict=True)]
        look = _look(label) | ({"ls": "none"} if prompt else {})
        if part:
            name = None if prompt and len(part) < len(rows) else _label(label)
            xs = [places[row.size] for row in part]
            axes.errorbar(xs, ratios, bars, label=name, marker="o", ms=4, capsize=2, **look)


def _where(results: Results) -> str:
    """Card, versions and model."""
    where = results.environment
    vllm = f", vLLM {where.vllm}" if where.vllm and any(row.engine == "vllm" for row in results.rows) else ""
    return f"{where.device}{vllm}, torch {where.torch.partition('+')[0]}: {model_of(results.command)}"


def _label(name: str) -> str:
    """A setup's name in a legend."""
    return (
        name.removeprefix("vllm ").replace("fp8_per_channel", "FP8 per channel").replace("baseline ", "small engine ")
    )


def _ms(row: Generation) -> float:
    return row.ttft_ms if _is_prompt(row.size) or row.tpot_ms is None else row.tpot_ms


def _spread(*rows: Generation) -> float:
    """The ranges over their medians of the times that `_ms` gives, added up."""
    names = ["ttft_ms" if _is_prompt(row.size) else "tpot_ms" for row in rows]
    return sum(row.spread.get(name, 0.0) for row, name in zip(rows, names, strict=True) if isinstance(row, Measured))


_COLOURS = {
    "rowint8": "#0b5fbf",
    "rowint8-a8": "#d1480b",
    "rowint8-lm-head": "#6aa9e8",
    "fp8_per_channel": "#1f8a4c",
    "fp8": "#9aa800",
    "w8a8": "#8b45b5",
    "w8a16": "#8a6d3b",
    "humming": "#444444",
    "machete": "#8a6d3b",
    "int8": "#5bb8c4",
    "int8-fused": "#00838f",
    "int8-a8": "#c2185b",
    "int8-fused-lm-head": "#e08a9d",
    "bf16-graph": "#777777",
    "bf16-compile": "#aaaaaa",
    "bf16-eager": "#c9b48a",
}
"""Setups to their colours in every picture; others have matplotlib's."""
_OURS = ("rowint8", "rowint8-a8", "int8-fused", "int8-a8")


def _look(label: str) -> dict:
    """Ours bold; a setup has one colour in every picture, and the small engine's lines are dashed."""
    engine, _, setup = label.rpartition(" ")
    look: dict = dict(lw=2.8, zorder=5) if setup in _OURS else dict(lw=1.2)
    look |= {"color": _COLOURS[setup]} if setup in _COLOURS else {}
    return look | ({"ls": "--"} if engine == "baseline" else {})


def _kl(results: Results[FidelityRow], axes) -> None:
    """A bar a way of rounding, the nearest to the original first; ours dark. Parts of a model are left out."""
    rows = [row for row in results.rows if row.kl_mean > 0 and not row.setup.startswith("only ")]
    rows.sort(key=lambda row: row.kl_mean, reverse=True)
    values = [1000 * row.kl_mean for row in rows]
    colours = [_COLOURS["rowint8"] if row.setup in _OURS else "#a9bcd3" for row in rows]
    bars = axes.barh([row.setup for row in rows], values, color=colours)
    axes.bar_label(bars, [f" {value:.2f}" for value in values], fontsize=9)
    axes.margins(x=0.12)
    axes.grid(axis="x", lw=0.4, alpha=0.6)
    axes.set_xlabel("KL divergence from the original, thousandths of a nat")
    axes.set_title(f"{model_of(results.command)}, {rows[0].tokens} tokens of {rows[0].text}", fontsize=10)


def _chains(rows: Sequence[ChainRow], device: str, axes) -> None:
    """The time of each chain over bf16's against tokens, with the interval; ours bold, a line at 1."""
    chains: dict[str, list[ChainRow]] = {}
    for row in sorted(rows, key=lambda row: row.M):
        if row.ratio:
            chains.setdefault(row.chain, []).append(row)
    for label, alike in chains.items():
        ratios = [row.ratio for row in alike if row.ratio]
        bars = [[each.value - each.low for each in ratios], [each.high - each.value for each in ratios]]
        values = [each.value for each in ratios]
        axes.errorbar([row.M for row in alike], values, bars, marker="o", ms=3, label=label, **_look(label))
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
    names = list(dict.fromkeys(_title(row) for row in rows))
    values = [[float("nan")] * len(counts) for _ in names]
    lost: list[tuple[int, int]] = []
    for row in rows:
        place = names.index(_title(row)), counts.index(row.M)
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


def _title(row: KernelRow) -> str:
    sizes = f"[{row.N}]" if row.op == "add_rms_norm" else f"[{row.N}, {row.K}]"
    return f"{row.op} {row.shape} {sizes}"
