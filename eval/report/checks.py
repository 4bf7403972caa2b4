"""What measured values cannot be. A row that breaks one of these stops the report."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import isclose

from rowint8.eval.errors import EvalError
from rowint8.eval.models import MODELS
from rowint8.eval.results.files import Results
from rowint8.eval.results.roofline import best_peer, compute_us, limit_us, multiplies_int8
from rowint8.eval.results.schema import (
    GIB,
    AgreementRow,
    Ceilings,
    ChainRow,
    FidelityRow,
    Generation,
    KernelRow,
    ProfileRow,
    QualityRow,
    ServeRow,
)

L2_BYTES = 50 * 2**20
"""L2 cache of the H100 and H200: a smaller weight may be found there."""
_RATIO = 5.0
"""INT8 reads half of what bf16 does; a kernel this many times faster or slower than the best other is a mistake."""
_CEILING_SLACK = 1.05
"""The ceilings are measured too, and the clock moves while a card warms up."""
_INT8_SLACK = 1.15
"""INT8's rate is taken as twice bf16's, which draws more power for an operation and so runs at a lower clock."""
_TIME_SLACK = 1.10
"""TTFT, TPOT and tok/s are medians of their own, and numbers of tokens are rounded means."""
_WEIGHT_SLACK = 1.25
"""Weights not read at each step: the embedding's rows of other tokens, up to an eighth of an INT8 Llama-3.1-8B."""


def check_all(found: Mapping[str, Results]) -> None:
    """Checks all rows of the files, given by the names that messages call them.

    Raises:
        EvalError: a value cannot be true; the message names the file and the row.
    """
    ceilings = read_ceilings(found)
    for name, results in found.items():
        for number, row in enumerate(results.rows):
            if problem := next(_problems(row, results, ceilings.get(results.environment.device)), None):
                raise EvalError(f"{name}: rows.{number}: {problem}; measure it again or mend the measurement")


def read_ceilings(found: Mapping[str, Results]) -> dict[str, float]:
    """Device to the highest read ceiling, TB/s, that any file has for it."""
    rates: dict[str, float] = {}
    for results in found.values():
        if results.ceilings:
            device = results.environment.device
            rates[device] = max(rates.get(device, 0.0), results.ceilings.read_tb_s)
    return rates


def _problems(row, results: Results, read_tb_s: float | None) -> Iterator[str]:
    if isinstance(row, KernelRow):
        yield from _kernel(row, results.ceilings)
    elif isinstance(row, ChainRow):
        yield from _chain(row)
    elif isinstance(row, Generation):
        yield from _generation(row, None if _has_experts(results.command) else read_tb_s)
    elif isinstance(row, ServeRow):
        yield from _serve(row)
    elif isinstance(row, ProfileRow):
        yield from _profile(row)
    elif isinstance(row, FidelityRow):
        yield from _ordered("KL", row.kl_median, row.kl_p99, row.kl_max)
        yield from _ordered("KL", row.kl_mean, row.kl_max)
    elif isinstance(row, AgreementRow) and row.agreed > row.tokens:
        yield f"{row.agreed} tokens agree of {row.tokens}"
    elif isinstance(row, QualityRow):
        yield from _quality(row, results)


def _kernel(row: KernelRow, ceilings: Ceilings | None) -> Iterator[str]:
    if "rowint8" not in row.us:
        yield "us has no rowint8"
    elif (best := best_peer(row)) and not 1 / _RATIO < row.us["rowint8"] / row.us[best] < _RATIO:
        yield f"rowint8 takes {row.us['rowint8'] / row.us[best]:.2f} times {best}'s time, which is not plausible"
    if ceilings is None or row.op == "add_rms_norm":
        return
    from_memory = row.N * row.K > L2_BYTES
    limit = limit_us(row, ceilings) if from_memory else compute_us(row, ceilings)
    slack = _INT8_SLACK if multiplies_int8(row) else _CEILING_SLACK
    for name, us in row.us.items():
        if us * slack < limit:
            yield f"{name} takes {us:.1f} us, less than the {limit:.1f} us that the card's ceilings allow"


def _chain(row: ChainRow) -> Iterator[str]:
    if row.ratio and not 1 / _RATIO < row.ratio.value < _RATIO:
        yield f"{row.chain} takes {row.ratio.value:.2f} times bf16's time, which is not plausible"
    if not 1 / _RATIO < row.products_us / row.products_alone_us < _RATIO:
        yield f"the products take {row.products_us:.0f} us in the chain, but {row.products_alone_us:.0f} us alone"


def _generation(row: Generation, read_tb_s: float | None) -> Iterator[str]:
    wall = row.batch * row.output_tokens / row.tok_s * 1000
    end = row.ttft_ms + (row.tpot_ms or 0.0) * (row.output_tokens - 1)
    if end > wall * _TIME_SLACK or (row.batch == 1 and wall > end * _TIME_SLACK):
        yield f"TTFT + TPOT x (tokens - 1) is {end:.1f} ms, but tok/s says that the run took {wall:.1f} ms"
    if row.peak_mem_gib < row.weights_gib:
        yield f"peak memory of {row.peak_mem_gib:.3f} GiB is below the weights' {row.weights_gib:.3f}"
    if read_tb_s and row.tpot_ms:
        rate = row.weights_gib * GIB / row.tpot_ms / 1e9
        if rate > read_tb_s * _WEIGHT_SLACK:
            yield f"TPOT means reading the weights at {rate:.2f} TB/s, above the card's {read_tb_s:.2f}"


def _has_experts(command: str) -> bool:
    """Whether a step may leave weights unread: those of experts that no token takes."""
    sparse = {name for name, shape in MODELS.items() if shape.keys() & {"num_experts", "num_local_experts"}}
    return not sparse.isdisjoint(command.split())


def _serve(row: ServeRow) -> Iterator[str]:
    for name, times in (("TTFT", row.ttft_ms), ("TPOT", row.tpot_ms), ("ITL", row.itl_ms)):
        yield from _ordered(name, times["p50"], times["p99"])
    if row.goodput * row.output_tokens > row.tok_s * _TIME_SLACK:
        yield f"goodput {row.goodput:.2f}/s x {row.output_tokens} tokens is more than {row.tok_s:.0f} tok/s"


def _profile(row: ProfileRow) -> Iterator[str]:
    whole, step = sum(row.parts_ms.values()), min(row.step_ms, row.profiled_ms)
    if whole * _TIME_SLACK < step:
        yield f"the parts add up to {whole:.3f} ms of a step of {step:.3f}"
    least = row.limit_ms["weights"] if row.limit_ms and row.weight_bytes > L2_BYTES else 0.0
    if row.parts_ms["matmul"] * _WEIGHT_SLACK < least:
        yield f"matmul takes {row.parts_ms['matmul']:.3f} ms, but reading the weights {least:.3f}"


def _quality(row: QualityRow, results: Results) -> Iterator[str]:
    if row.metric.startswith(("acc", "exact_match")) and not 0 <= row.value <= 1:
        yield f"{row.metric} is {row.value}, outside 0 to 1"
    base = next(other for other in results.rows if (other.task, other.metric) == (row.task, row.metric))
    if row.difference is not None and not isclose(row.value - base.value, row.difference, rel_tol=1e-4, abs_tol=1e-6):
        yield f"{row.metric} is {row.value}, but the first setup's {base.value} and {row.difference:+}"


def _ordered(name: str, *values: float) -> Iterator[str]:
    if any(first > second for first, second in pairwise(values)):
        yield f"{name}: {', '.join(f'{value:.4g}' for value in values)} should not fall"
