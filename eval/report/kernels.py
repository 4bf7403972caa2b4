"""Kernel rows: each time for the console; in documents beside the best that is not ours, cell by cell and counted."""

from collections.abc import Sequence

from rowint8.eval.markdown import TBD, folded, number, table
from rowint8.eval.report.engine import commit_of
from rowint8.eval.results.files import Results
from rowint8.eval.results.roofline import EVEN, best_peer, bytes_moved, limit_us, misses, operations, ratio
from rowint8.eval.results.schema import Ceilings, KernelRow
from rowint8.eval.tables import Table

README_TOKENS = (1, 4, 16, 64, 128, 256, 512, 2048, 8192)
_INT8 = ("marlin", "machete", "gemlite", "humming", "cutlass")
_WORST = 10
_WORST_IN_DOCUMENTS = 5


def short_table(results: Results[KernelRow]) -> str:
    """gate_up and SwiGLU of Llama-3.1-8B, then where rowint8 is slower than the best other."""
    rows = {(row.op, row.M): row for row in results.rows if row.shape == "gate_up"}
    heading = ["tokens", "gate_up: rowint8", "cuBLAS bf16", "best other INT8", "ratio"]
    heading += ["SwiGLU: rowint8", "cuBLAS bf16 + SiLU", "best other INT8 + SiLU", "ratio"]
    lines = [[str(m), *_cells(rows.get(("linear", m))), *_cells(rows.get(("swiglu", m)))] for m in README_TOKENS]
    return f"{conditions(results)}\n\n{table(heading, lines)}\n{misses_line(results.rows)}\n"


def _cells(row: KernelRow | None) -> list[str]:
    if row is None:
        return [TBD] * 4
    return [
        number(row.us["rowint8"], 1),
        _fastest(row, "cublas").split()[0],
        _fastest(row, *_INT8),
        number(ratio(row), 2),
    ]


def _fastest(row: KernelRow, *prefixes: str) -> str:
    best = best_peer(row, prefixes or ("",))
    return f"{row.us[best]:.1f} {best.removesuffix('_vllm')}" if best else TBD


def conditions(results: Results[KernelRow]) -> str:
    """One line on where and how the rows were measured."""
    where = results.environment
    dtypes = " and ".join(dict.fromkeys(row.dtype for row in results.rows))
    line = (
        f"{where.device}, torch {where.torch}, Triton {where.triton}, commit {commit_of(where)}, {dtypes} activations, "
    )
    line += "microseconds a call"
    if results.ceilings:
        line += (
            f"; ceilings of the run: {results.ceilings.read_tb_s:.2f} TB/s, {results.ceilings.bf16_tflop_s:.0f} TFLOP/s"
        )
    return line + "."


def misses_line(rows: Sequence[KernelRow]) -> str:
    """How many cells are certainly slower than cuBLAS, and than the best of all."""
    kinds = {"cuBLAS": ("cublas",), "the best other 8-bit kernel": _INT8, "the best other": ("",)}
    parts = []
    for name, prefixes in kinds.items():
        beside = [row for row in rows if best_peer(row, prefixes)]
        parts.append(f"{name} in {sum(misses(row, prefixes) for row in beside)} of {len(beside)} cells")
    where = "lower end of the ratio's 95% interval" if any(row.paired for row in rows) else "ratio"
    return f"Slower, with the {where} above {1 + EVEN:.2f}, than {', '.join(parts)}."


def worst_table(rows: Sequence[KernelRow]) -> Table:
    """The cells with the highest ratios to the best other, and how many miss."""
    beside = sorted((row for row in rows if ratio(row)), key=lambda row: -(ratio(row) or 0.0))[:_WORST]
    return Table(
        ["cell", "M", "rowint8", "best other", "ratio", "95% interval", "MHz"],
        [_worst_cells(row) for row in beside],
        title=f"The {len(beside)} worst cells",
        note=misses_line(rows),
    )


def _worst_cells(row: KernelRow) -> list[str]:
    best = best_peer(row) or ""
    paired = row.paired[best] if row.paired else None
    return [
        f"{row.op} {row.shape}",
        str(row.M),
        f"{row.us['rowint8']:.1f}",
        _fastest(row),
        number(ratio(row), 3),
        f"{paired.low:.3f} to {paired.high:.3f}" if paired else "",
        "{} to {}".format(*row.sm_mhz) if row.sm_mhz else "",
    ]


def kernel_part(results: Results[KernelRow]) -> str:
    """`short_table`, and the share of the card's limit of each operator and shape."""
    return f"{short_table(results)}\n{limits(results)}"


def kernel_section(results: Results[KernelRow]) -> str:
    """Each operator and shape at some numbers of tokens, how many cells are slower, and the worst of them, folded."""
    worst = Table(worst_table(results.rows).columns, worst_table(results.rows).lines[:_WORST_IN_DOCUMENTS]).markdown()
    note = "Time over the best other's, in brackets the share of the least time that the card allows."
    lost = folded(f"The worst {_WORST_IN_DOCUMENTS} cells", worst)
    return f"{conditions(results)} {note}\n\n{_ratios(results)}\n{misses_line(results.rows)}\n\n{lost}"


def _ratios(results: Results[KernelRow]) -> str:
    rows = {(row.op, row.shape, row.M): row for row in results.rows}
    counts = [m for m in README_TOKENS if any(m == row.M for row in results.rows)]
    lines = []
    for op, shape in dict.fromkeys(key[:2] for key in rows):
        lines.append([f"{op} {shape}", *(_ratio_cell(rows.get((op, shape, m)), results.ceilings) for m in counts)])
    return table(["tokens", *map(str, counts)], lines)


def _ratio_cell(row: KernelRow | None, ceilings: Ceilings | None) -> str:
    if row is None:
        return ""
    value = ratio(row)
    told = f"{value:.2f}" if value else "-"
    return f"{told} ({_share(row, ceilings)})" if ceilings and row.op != "add_rms_norm" else told


def kernel_tables(rows: Sequence[KernelRow], ceilings: Ceilings) -> list[Table]:
    """For the console: a table for each operator, a line a row with every time in it."""
    by_op = {op: [row for row in rows if row.op == op] for op in dict.fromkeys(row.op for row in rows)}
    return [_console_table(op, part, ceilings) for op, part in by_op.items()]


def _console_table(op: str, rows: Sequence[KernelRow], ceilings: Ceilings) -> Table:
    spread = max(max(row.spread.values()) for row in rows)
    others = [name for name in dict.fromkeys(name for row in rows for name in row.us) if name != "rowint8"]
    return Table(
        ["shape", "M", "rowint8", *others, "vs best", "host us", "GB/s", "TFLOP/s", "of limit"],
        [_console_cells(row, others, ceilings) for row in rows],
        title=f"{op}: microseconds a call, {', '.join(dict.fromkeys(row.dtype for row in rows))} activations",
        note="vs best: time / the best other's; host us: to queue a call; of limit: the least time the card allows / "
        f"time, at its read ceiling of {ceilings.read_tb_s:.2f} TB/s or {ceilings.bf16_tflop_s:.0f} TFLOP/s in bf16; "
        f"largest spread {spread:.1%}",
    )


def _console_cells(row: KernelRow, others: Sequence[str], ceilings: Ceilings) -> list[str]:
    ours, best = row.us["rowint8"], best_peer(row)
    return [
        row.shape,
        str(row.M),
        f"{ours:.1f}",
        *(f"{row.us[name]:.1f}" if name in row.us else "" for name in others),
        f"{ours / row.us[best]:.2f} {best}" if best else "",
        f"{row.host_us['rowint8']:.0f}" if row.host_us else "",
        f"{bytes_moved(row) / ours / 1e3:.0f}",
        f"{operations(row) / ours / 1e6:.1f}" if operations(row) else "",
        f"{limit_us(row, ceilings) / ours:.0%}",
    ]


def limits(results: Results[KernelRow], tokens: Sequence[int] = (1, 16, 64, 128, 256, 512, 2048)) -> str:
    """Share of the card's limit that rowint8 reaches, a line an operator and shape."""
    rows = {(row.op, row.shape, row.M): row for row in results.rows if row.op != "add_rms_norm"}
    lines = []
    for op, shape in dict.fromkeys(key[:2] for key in rows):
        cells = [rows.get((op, shape, m)) for m in tokens]
        lines.append([f"{op} {shape}", *(_share(row, results.ceilings) for row in cells)])
    return table(["of the limit", *(f"M = {m}" for m in tokens)], lines)


def _share(row: KernelRow | None, ceilings: Ceilings | None) -> str:
    return f"{limit_us(row, ceilings) / row.us['rowint8']:.0%}" if row and ceilings else TBD


def compiler_table(results: Results[KernelRow]) -> str:
    """What torch.compile made of each operator: numbers of tokens with the same kernels share a line."""
    groups: dict[tuple, list[tuple[KernelRow, str]]] = {}
    for row in results.rows:
        for mode, made in (row.compiler or {}).items():
            groups.setdefault((row.op, mode, made.kernels, made.extern), []).append((row, mode))
    lines = []
    for (op, mode, kernels, extern), members in groups.items():
        times = [row.us[mode] / row.us["rowint8"] for row, mode in members if mode in row.us]
        reach = " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(times), max(times)))) if times else TBD
        names = [*(f"`{name}`" for name in kernels), *(f"*{name}*" for name in extern)]
        lines.append([op, mode, ", ".join(str(row.M) for row, _ in members), ", ".join(names), reach])
    return table(["operator", "mode", "M", "kernels (*library calls*)", "time / rowint8's"], lines)
