"""What a kernel row means beside its card and the others: the least time for it, the best other, the ratio to it."""

from rowint8.eval.results.schema import Ceilings, KernelRow

EVEN = 0.02
"""Ratios this near to 1 count as even."""
_ACTIVATION_BYTES = 2
_INT8_RATE = 2
"""Tensor cores multiply INT8 at twice the rate of bf16."""


def multiplies_int8(row: KernelRow) -> bool:
    """Whether both operands of the product are INT8."""
    return row.op.endswith("_int8")


def bytes_moved(row: KernelRow) -> int:
    """What a call must read and write at least.

    A product: the INT8 weight, its scales and the activations, read: INT8 tokens once they are rounded.
    `add_rms_norm`: x and the residual read, the normalized rows and the sum written. `experts`: both weights of each
    expert in use, and the tokens.
    """
    if row.experts_used:
        weights = row.N * row.K * 3 // 2 + 2 * (row.N + row.K)
        return round(row.experts_used * weights) + row.M * row.K * _ACTIVATION_BYTES
    if row.op == "add_rms_norm":
        return 4 * row.M * row.N * _ACTIVATION_BYTES
    return row.N * row.K + 2 * row.N + row.M * row.K * (1 if multiplies_int8(row) else _ACTIVATION_BYTES)


def operations(row: KernelRow) -> int:
    """Multiplications and additions of the product; 0 for `add_rms_norm`."""
    if row.topk:
        return 3 * row.M * row.topk * row.N * row.K
    return 0 if row.op == "add_rms_norm" else 2 * row.M * row.N * row.K


def limit_us(row: KernelRow, ceilings: Ceilings) -> float:
    """The least time that the card allows: moving the bytes at its read ceiling or computing, whichever is longer.

    `add_rms_norm` of few tokens finds its inputs in the L2 cache, which is faster than that.
    """
    return max(bytes_moved(row) / (ceilings.read_tb_s * 1e6), compute_us(row, ceilings))


def compute_us(row: KernelRow, ceilings: Ceilings) -> float:
    """The least time for the product's arithmetic; 0 for `add_rms_norm`."""
    rate = ceilings.bf16_tflop_s * (_INT8_RATE if multiplies_int8(row) else 1)
    return operations(row) / (rate * 1e6)


def best_peer(row: KernelRow, prefixes: tuple[str, ...] = ("",)) -> str | None:
    """Name of the fastest that is not made of our kernels, of those that begin so; None where there is none.

    "unfused" is our product followed by SiLU and multiplication.
    """
    names = [name for name in row.us if not name.startswith(("rowint8", "unfused")) and name.startswith(prefixes)]
    return min(names, key=row.us.__getitem__, default=None)


def ratio(row: KernelRow) -> float | None:
    """Our time / the best peer's: below 1 ours is faster. None without a peer."""
    best = best_peer(row)
    if best is None:
        return None
    return row.paired[best].value if row.paired else row.us["rowint8"] / row.us[best]


def misses(row: KernelRow, prefixes: tuple[str, ...] = ("",)) -> bool:
    """Whether ours is certainly slower than the best peer of those that begin so: the lower end of the ratio's interval
    is above 1 + EVEN. Rows without intervals are judged by the ratio."""
    best = best_peer(row, prefixes)
    if best is None:
        return False
    return (row.paired[best].low if row.paired else row.us["rowint8"] / row.us[best]) > 1 + EVEN
