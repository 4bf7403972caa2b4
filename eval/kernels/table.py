"""Kernel rows for people: each operator's times beside the best other and the card's own limit."""

from collections.abc import Sequence

from rich.table import Table

from rowint8.eval.console import compact_table
from rowint8.eval.results.schema import Ceilings, KernelRow

_ACTIVATION_BYTES = 2


def bytes_moved(row: KernelRow) -> int:
    """What a call must read and write at least.

    A product: the INT8 weight, its scales and the activations, read. `add_rms_norm`: x and the residual read, the
    normalized rows and the sum written.
    """
    if row.op == "add_rms_norm":
        return 4 * row.M * row.N * _ACTIVATION_BYTES
    return row.N * row.K + 2 * row.N + row.M * row.K * _ACTIVATION_BYTES


def operations(row: KernelRow) -> int:
    """Multiplications and additions of the product; 0 for `add_rms_norm`."""
    return 0 if row.op == "add_rms_norm" else 2 * row.M * row.N * row.K


def limit_us(row: KernelRow, ceilings: Ceilings) -> float:
    """The least time that the card allows: moving the bytes at its read ceiling or computing, whichever is longer.

    `add_rms_norm` of few tokens finds its inputs in the L2 cache, which is faster than that.
    """
    return max(bytes_moved(row) / (ceilings.read_tb_s * 1e6), operations(row) / (ceilings.bf16_tflop_s * 1e6))


def best_peer(row: KernelRow, prefixes: tuple[str, ...] = ("",)) -> str | None:
    """Name of the fastest that is not made of our kernels, of those that begin so; None where there is none.

    "unfused" is our product followed by SiLU and multiplication.
    """
    names = [name for name in row.us if not name.startswith(("rowint8", "unfused")) and name.startswith(prefixes)]
    return min(names, key=row.us.__getitem__, default=None)


def kernel_tables(rows: Sequence[KernelRow], ceilings: Ceilings) -> list[Table]:
    """A table for each operator, a line a row."""
    by_op = {op: [row for row in rows if row.op == op] for op in dict.fromkeys(row.op for row in rows)}
    return [_table(op, part, ceilings) for op, part in by_op.items()]


def _table(op: str, rows: Sequence[KernelRow], ceilings: Ceilings) -> Table:
    spread = max(max(row.spread.values()) for row in rows)
    table = compact_table(
        f"{op}: microseconds a call, {', '.join(dict.fromkeys(row.dtype for row in rows))} activations",
        "vs best: time / the best other's; host us: to queue a call; of limit: the least time the card allows / time, "
        f"at its read ceiling of {ceilings.read_tb_s:.2f} TB/s or {ceilings.bf16_tflop_s:.0f} TFLOP/s in bf16; "
        f"largest spread {spread:.1%}",
    )
    others = [name for name in dict.fromkeys(name for row in rows for name in row.us) if name != "rowint8"]
    table.add_column("shape", overflow="fold")
    for heading in ("M", "rowint8", *others, "vs best", "host us", "GB/s", "TFLOP/s", "of limit"):
        table.add_column(heading, justify="right")
    for row in rows:
        ours, best = row.us["rowint8"], best_peer(row)
        table.add_row(
            row.shape,
            str(row.M),
            f"{ours:.1f}",
            *(f"{row.us[name]:.1f}" if name in row.us else "" for name in others),
            f"{ours / row.us[best]:.2f} {best}" if best else "",
            f"{row.host_us['rowint8']:.0f}" if row.host_us else "",
            f"{bytes_moved(row) / ours / 1e3:.0f}",
            f"{operations(row) / ours / 1e6:.1f}" if operations(row) else "",
            f"{limit_us(row, ceilings) / ours:.0%}",
        )
    return table
