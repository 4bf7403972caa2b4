"""A block of results for others to read: `rowint8 card` prints it, docs/contributed.md collects them."""

import re
from collections.abc import Mapping

from rowint8.eval.errors import EvalError
from rowint8.eval.markdown import folded
from rowint8.eval.quantize.sizes import ModelSizes
from rowint8.eval.report.checks import check_all
from rowint8.eval.report.engine import course_table
from rowint8.eval.report.quality import fidelity_table, quality_table
from rowint8.eval.report.serve import serve_table
from rowint8.eval.results.files import Environment, Results, in_one_line, parse_results
from rowint8.eval.results.schema import GIB, FidelityRow, Generation, QualityRow, ServeRow

_JSON = re.compile(r"^```json\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_BEGUN = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*json\b", re.IGNORECASE | re.MULTILINE)
"""What a reader sees as the beginning of a block, however it is written."""


def card_block(sizes: ModelSizes, found: Mapping[str, Results]) -> str:
    """Machine, versions, model, a table of each file, and the files themselves, as Markdown.

    Args:
        found: what was measured of the model, by the files' names.

    Raises:
        EvalError: a file holds other rows than those of engines and quality, what cannot be, or is of another machine.
    """
    check_all(found)
    first = next(iter(found.values())).environment
    for name, results in found.items():
        if results.environment.device != first.device:
            raise EvalError(
                f"{name} is of {results.environment.device}, {next(iter(found))} of {first.device}; a block is of one"
            )
    head = f"### {first.device}: {sizes.model}\n\n{_machine(first)}\n{_model(sizes)}\n"
    return "\n".join([head, *(_part(name, results) for name, results in found.items())])


def _machine(where: Environment) -> str:
    versions = {"vLLM": where.vllm, "torch": where.torch, "Triton": where.triton, "driver": where.driver}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"rowint8 {where.rowint8} ({(where.git_commit or 'no commit known')[:9]}), {told}; {where.date[:10]}."


def _model(sizes: ModelSizes) -> str:
    bf16, int8 = (sizes.weights[form] / GIB for form in ("bf16", "rowint8"))
    return f"{sizes.linear_layers} linear layers become INT8; all weights: {bf16:.2f} GiB in bf16, {int8:.2f} in INT8."


def _part(name: str, results: Results) -> str:
    rows = results.rows
    if isinstance(rows[0], Generation):
        shown = course_table(rows)
    elif isinstance(rows[0], ServeRow):
        shown = serve_table(rows)
    elif isinstance(rows[0], QualityRow):
        shown = quality_table(rows)
    elif isinstance(rows[0], FidelityRow):
        shown = fidelity_table(rows)
    else:
        raise EvalError(
            f"{name} holds rows of kind {rows[0].kind}; give files of `rowint8 bench vllm`, `bench engine`, "
            "`bench serve`, `quality` or `fidelity`"
        )
    file = f"```json\n{in_one_line(results)}\n```"
    random = isinstance(rows[0], Generation | ServeRow) and "--model" not in results.command
    note = "Random weights of the model's shape.\n\n" if random else ""
    return f"{note}{shown.markdown()}\n{folded(results.command, file)}"


def contributed(text: str, name: str) -> list[Results]:
    """The result files in the blocks of a document.

    Raises:
        EvalError: one is not of the form in `schema`, or holds what cannot be; the message names document and block.
    """
    blocks = _JSON.findall(text)
    if (begun := len(_BEGUN.findall(text))) != len(blocks):
        raise EvalError(
            f"{name} begins {begun} blocks of JSON, of which {len(blocks)} are whole; "
            "paste each as `rowint8 card` prints it, between lines of ```json and ```"
        )
    parts = enumerate(blocks, 1)
    found = {f"{name}, block {number}": parse_results(part, f"{name}, block {number}") for number, part in parts}
    check_all(found)
    return list(found.values())
