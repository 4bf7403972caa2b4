"""results/*.json as Markdown: REPORT.md, and the generated parts of other documents. Measures nothing.

A part of a document whose file is missing is TBD. New files of a known kind need no change here.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.markdown import TBD, fill, folded, number, table
from rowint8.eval.models import MODELS, embedding_bytes
from rowint8.eval.plots import pictures
from rowint8.eval.report.card import contributed
from rowint8.eval.report.chain import chain_section
from rowint8.eval.report.checks import check_all, read_ceilings
from rowint8.eval.report.engine import engine_part
from rowint8.eval.report.kernels import compiler_table, kernel_section, limits, short_table, tallies
from rowint8.eval.report.memory import memory_section
from rowint8.eval.report.profile import parts_part, profile_section
from rowint8.eval.report.quality import agreement_cells, fidelity_line, fidelity_table, quality_summary, quality_table
from rowint8.eval.report.serve import serve_table
from rowint8.eval.report.vllm import vllm_part
from rowint8.eval.results.files import Results, read_results
from rowint8.eval.results.schema import (
    GIB,
    AgreementRow,
    ChainRow,
    EngineRow,
    FidelityRow,
    Generation,
    KernelRow,
    Measured,
    ProfileRow,
    QualityRow,
    ServeRow,
)

Found = Mapping[str, Results]
"""Result files by their names without ".json"."""
Section = Callable[[Results], str]
"""Makes Markdown of a result file."""

_SPREADS = {"ttft_ms": "TTFT", "tok_s": "tok/s"}
_LLAMA_FILES = ("engine-h200", "vllm-h200", "engine-h100", "vllm-h100")
"""Files of models with Llama-3.1-8B's shape."""
_CONTRIBUTED = "docs/contributed.md"
"""Blocks of `rowint8 card` from other machines, which are checked."""
_DOCUMENTS = ("README.md", "POSTMORTEM.md", "docs/engine.md", "docs/vllm.md")


def read_folder(folder: Path) -> dict[str, Results]:
    """Every result file of a folder, checked.

    Raises:
        EvalError: there is none, or one is not of the form in `schema` or holds what cannot be.
    """
    found = {path.stem: read_results(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise EvalError(f"{folder} has no result files; `rowint8 demo --json {folder}/demo.json` makes one")
    check_all({f"{stem}.json": results for stem, results in found.items()})
    return found


def documents(folder: Path, found: Found) -> dict[Path, str]:
    """What REPORT.md and the documents with generated parts should be; those beside the folder, where they exist.

    Raises:
        EvalError: a document cannot be read, asks for a part that does not exist, or holds a block that is wrong.
    """
    above = Path(os.path.normpath(folder / ".."))  # not folder.parent, which of "." is "." again
    if (above / _CONTRIBUTED).is_file():
        contributed(_text(above / _CONTRIBUTED), _CONTRIBUTED)
    beside = [above / name for name in _DOCUMENTS]
    filled = {path: fill(_text(path), parts(found), path.name) for path in beside if path.is_file()}
    return {folder / "REPORT.md": report(found), **filled}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None


def parts(found: Found) -> dict[str, str]:
    """The generated parts of other documents by the names in their markers."""
    kernels = found.get("kernels-h200")
    return {
        "kernels": f"{short_table(kernels)}\n{tallies(_of_kind(found, KernelRow))}",
        "quality": _section(found, "quality-smollm2", quality_summary),
        "quality-h100": _section(found, "quality-h100", quality_summary),
        "agreement": _agreement(found) or TBD,
        "limits": limits(kernels),
        "compiler": compiler_table(found.get("kernels-compile-h100")),
        "gaps": _gaps(found),
        "vllm": _section(found, "vllm-h200", vllm_part),
        "vllm-h100": _section(found, "vllm-h100", vllm_part),
        "vllm-tp2": "\n".join(_section(found, f"vllm-{cards}", vllm_part) for cards in ("h100x2", "h200x2")),
        "fidelity": _section(found, "fidelity-smollm2", fidelity_line),
        "profile": _section(found, "profile-h100", parts_part),
        "engine": _section(found, "engine-h200", engine_part),
        "engine-cpu": _section(found, "engine-cpu", engine_part),
    }


def refuse_mixed(found: Found) -> None:
    """Raises EvalError where not all files were measured by the same code."""
    files: dict[str, list[str]] = {}
    for stem, results in found.items():
        env = results.environment
        code = f"code {env.code}" if env.code else f"commit {(env.git_commit or 'unknown')[:12]}"
        files.setdefault(code, []).append(stem)
    if len(files) > 1:
        told = "; ".join(f"{code}: {', '.join(stems)}" for code, stems in files.items())
        raise EvalError(
            f"the files are of different code ({told}); measure the older ones again (`rowint8 matrix`), move them "
            "away, or give --mixed to show them all the same"
        )


def report(found: Found) -> str:
    """REPORT.md: a section for each kind of row that the files have."""
    sections = {
        "Whole engines": _engines(found),
        "Prompt processing and token generation": _pp_tg(found),
        "Serving under load": _serving(found),
        "Where a decode step's time goes": _chapters(found, ProfileRow, profile_section),
        "Kernels": _kernels(found),
        "Layers without attention": _chapters(found, ChainRow, chain_section),
        "Memory": memory_section(read_ceilings(found)),
        "Quality": _quality(found),
        "Agreement of the two engines": _agreement(found),
        "Plots": "\n".join(f"![{name}]({name})" for name in pictures(found)),
        "Reproduction": _reproduction(found),
    }
    head = "# Report\n\nWritten by `rowint8 report` from the files in this folder; do not edit. "
    head += "What the columns mean is defined in [metrics.py](../baseline_engine/metrics.py).\n"
    return head + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections.items() if text.strip())


def _of_kind(found: Found, kind: type) -> dict[str, Results]:
    return {stem: results for stem, results in found.items() if isinstance(results.rows[0], kind)}


def _chapters(found: Found, kind: type, section: Section) -> str:
    """A chapter for every file with such rows."""
    return "\n".join(f"### {stem}\n\n{section(each)}\n" for stem, each in _of_kind(found, kind).items())


def _section(found: Found, stem: str, section: Section) -> str:
    return section(found[stem]) if stem in found else TBD


def _kernels(found: Found) -> str:
    kernels = _of_kind(found, KernelRow)
    return f"{tallies(kernels)}\n{_chapters(found, KernelRow, kernel_section)}" if kernels else ""


def _engines(found: Found) -> str:
    note = "baseline: the small engine of this repository; x: tok/s over the first line's of the same batch and tokens."
    chapters = _chapters(found, Generation, engine_chapter)
    return f"{note}\n\n{chapters}" if chapters else ""


def engine_chapter(results: Results[Generation]) -> str:
    """Where, by what, and a line a row."""
    rows = results.rows
    tasks = list(dict.fromkeys(row.size for row in rows))
    firsts = {row.size: row for row in reversed(rows)}
    lines = [_engine_cells(row, firsts[row.size]) for row in sorted(rows, key=lambda row: tasks.index(row.size))]
    heading = ["setup", "batch", "prompt tokens", "output tokens", "TTFT ms", "tok/s", "peak memory GiB", "notes"]
    return f"{results.environment.device}, `{results.command}`\n\n{table(heading, lines)}"


def _role(row: Generation) -> str:
    """The engine and setup without its mode, such as "baseline int8-fused"."""
    return re.sub("-(eager|compile|graph)$", "", f"{row.engine} {row.setup}")


def _engine_cells(row: Generation, first: Generation) -> list[str]:
    counts = [str(n) for n in (row.batch, row.prompt_tokens, row.output_tokens)]
    gaps = f"ITL {row.itl_ms:.2f} ms, TPOT {row.tpot_ms:.2f} ms, " if row.itl_ms and row.tpot_ms else ""
    notes = f"{gaps}weights {row.weights_gib:.3f} GiB, {row.tok_s / first.tok_s:.2f}x"
    if isinstance(row, EngineRow) and row.host_ms is not None and row.kv_waste is not None:
        notes += f", host {row.host_ms:.2f} ms a step, KV waste {row.kv_waste:.1%}, {row.attention} attention"
    if isinstance(row, Measured):
        notes += "".join(
            f", spread of {name} {row.spread[key]:.0%}" for key, name in _SPREADS.items() if key in row.spread
        )
    times = [number(row.ttft_ms, 1), number(row.tok_s, 1), number(row.peak_mem_gib, 3)]
    return [f"{row.engine} {row.setup}", *counts, *times, notes]


def _pp_tg(found: Found) -> str:
    lines = []
    for stem, results in _of_kind(found, Generation).items():
        for row in results.rows:
            setup = [stem, f"{row.engine} {row.setup}", number(row.weights_gib, 3), str(row.batch)]
            if row.output_tokens == 1 or row.batch == 1:
                lines.append([*setup, f"pp{row.prompt_tokens}", f"{row.prompt_tokens * _prompts_s(row):.1f}"])
            if row.tpot_ms:
                lines.append([*setup, f"tg{row.output_tokens}", f"{row.batch * 1000 / row.tpot_ms:.1f}"])
    note = "\npp: prompt tokens a second until the first token; tg: batch / TPOT, the prompts left out.\n"
    return table(["file", "setup", "weights GiB", "batch", "test", "t/s"], lines) + note if lines else ""


def _prompts_s(row: Generation) -> float:
    return row.tok_s if row.output_tokens == 1 else 1000 / row.ttft_ms


def _serving(found: Found) -> str:
    rows = [(stem, row) for stem, results in _of_kind(found, ServeRow).items() for row in results.rows]
    return serve_table(rows).markdown() if rows else ""


def _quality(found: Found) -> str:
    lm_eval = _chapters(found, QualityRow, lambda results: quality_table(results.rows).markdown())
    kl = _chapters(found, FidelityRow, lambda results: fidelity_table(results.rows).markdown())
    return f"{lm_eval}\n{kl}"


def _agreement(found: Found) -> str:
    lines = [agreement_cells(stem, results) for stem, results in _of_kind(found, AgreementRow).items()]
    headings = ["file", "greedy tokens, rowint8", "on", "prompts that agree", "gaps where they part, nats"]
    return table(headings, lines) if lines else ""


def _gaps(found: Found) -> str:
    """One request: time a token beside the least to read what a step reads, and beside vLLM's with the same weights."""
    ceilings = read_ceilings(found)
    lines = []
    for stem in _LLAMA_FILES:
        results = found.get(stem)
        rows = [row for row in results.rows if row.batch == 1 and row.tpot_ms] if results else []
        rates = ceilings.get(results.environment.device) if results else None
        lines += [_gap_cells(stem, row, rows, rates) for row in rows] or [[stem, *[TBD] * 5]]
    return table(["file", "setup", "TPOT ms", "reading the weights, ms", "x that", "x vLLM's"], lines)


def _gap_cells(stem: str, row: Generation, rows: Sequence[Generation], read_tb_s: float | None) -> list[str]:
    tpot = row.tpot_ms or 0.0
    read = row.weights_gib * GIB - embedding_bytes(MODELS["llama-3.1-8b"])
    least = read / read_tb_s / 1e9 if read_tb_s else None
    peer = "vllm bf16" if "bf16" in row.setup else "vllm rowint8"
    vllm = next((other.tpot_ms for other in rows if _role(other) == peer), None) if row.engine == "baseline" else None
    beside = f"{tpot / vllm:.2f}" if vllm else "-"
    times = [f"{tpot:.2f}", number(least, 2), number(tpot / least if least else None, 2), beside]
    return [stem, f"{row.engine} {row.setup}", *times]


def _reproduction(found: Found) -> str:
    heading = ["file", "measured", "device", "driver", "python", "torch", "triton", "transformers", "vllm", "commit"]
    lines, commands = [], ""
    for stem, results in found.items():
        env = results.environment
        commit = (env.git_commit or "not a checkout")[:14] + (" + changes" if env.git_dirty else "")
        versions = [env.driver, env.python, env.torch, env.triton, env.transformers, env.vllm]
        lines.append([f"[{stem}]({stem}.json)", env.date, env.device, *(v or "none" for v in versions), commit])
        inner = [row.command for row in results.rows if getattr(row, "command", None)]
        commands += "\n".join([f"# {stem}.json", results.command, *(f"#   {line}" for line in inner), ""])
    note = "A command's `--json` names the file only; lines after `#` are what it ran.\n\n"
    return f"{table(heading, lines)}\n" + folded("Commands", f"{note}```\n{commands}```\n")
