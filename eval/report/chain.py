"""Chain rows: what the layers of a model take in each format, beside bf16 and beside their products alone."""

from collections.abc import Sequence

from rowint8.eval.results.files import Results
from rowint8.eval.results.schema import ChainRow
from rowint8.eval.tables import Table

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


def chain_section(results: Results[ChainRow]) -> str:
    """Where and of what, and the table."""
    first, where = results.rows[0], results.environment
    line = f"{where.device}, torch {where.torch}, Triton {where.triton}, vLLM {where.vllm or 'not installed'}; "
    line += f"{first.layers} layers of {first.model} in one CUDA graph, attention left out, bf16 activations. "
    line += "Products: the chain less its norms and activations alone; alone: the products' isolated calls. "
    return f"{line}{kernels_line(results.rows)}\n\n{chain_table(results.rows).markdown()}"
