"""Chain rows: what the layers of a model take in each format, beside bf16 and beside their products alone."""

from collections.abc import Sequence

from rowint8.eval.report.engine import commit_of
from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import ChainRow
from rowint8.eval.tables import Table

TOKENS = (1, 8, 32, 64, 128, 129, 256, 300, 513, 1100, 3000)
"""Numbers of tokens in documents."""
COLUMNS = ("M", "chain", "us", "spread", "x bf16", "95% interval", "products us", "alone us", "x alone")


def chain_table(rows: Sequence[ChainRow]) -> Table:
    """A line a number of tokens and chain."""
    first = rows[0]
    return Table(
        COLUMNS,
        [_cells(row) for row in sorted(rows, key=lambda row: row.M)],
        title=f"{first.layers} layers of {first.model}, attention left out",
        note="products: the chain less its norms and activations alone; alone: the products' isolated calls\n"
        + kernels_line(rows),
        words=2,
        grouped=True,
    )


def _cells(row: ChainRow) -> list[str]:
    ratio = row.ratio
    return [
        str(row.M),
        row.chain,
        f"{row.us:.0f}",
        f"{row.spread:.1%}",
        f"{ratio.value:.3f}" if ratio else "",
        f"{ratio.low:.3f} to {ratio.high:.3f}" if ratio else "",
        f"{row.products_us:.0f}",
        f"{row.products_alone_us:.0f}",
        f"{row.products_us / row.products_alone_us:.2f}",
    ]


def kernels_line(rows: Sequence[ChainRow]) -> str:
    """What each chain is made of."""
    made = dict.fromkeys((row.chain, row.kernels) for row in rows)
    return ". ".join(f"{chain}: {kernels}" for chain, kernels in made) + "."


def chain_part(results: Results[ChainRow]) -> str:
    """Where and of what, and each chain's time over bf16's at some numbers of tokens; the picture has the others."""
    rows, where = results.rows, results.environment
    chains = [chain for chain in dict.fromkeys(row.chain for row in rows) if chain != "bf16"]
    found = {(row.M, row.chain): row for row in rows}
    counts = [m for m in TOKENS if (m, "bf16") in found] or sorted({row.M for row in rows})
    lines = []
    for m in counts:
        ratios = [found[m, chain].ratio if (m, chain) in found else None for chain in chains]
        bf16 = f"{found[m, 'bf16'].us:.0f}" if (m, "bf16") in found else ""
        lines.append([str(m), bf16, *(f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})" if r else "" for r in ratios)])
    head = f"{where.device}, torch {where.torch}, Triton {where.triton}, vLLM {where.vllm or 'not installed'}, commit "
    head += f"{commit_of(where)}; {rows[0].layers} layers of {rows[0].model} in one CUDA graph, attention left out. "
    head += f"Time over bf16's, 95% intervals. {kernels_line(rows)}"
    return f"{head}\n\n{Table(['tokens', 'bf16 us', *chains], lines).markdown()}"
