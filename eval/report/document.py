"""results/*.json as Markdown: REPORT.md, and the generated parts of other documents. Measures nothing.

A part of a document whose file is missing is one line. New files of a known kind need no change here.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from rowint8.eval.errors import EvalError
from rowint8.eval.markdown import TBD, fill, folded, table
from rowint8.eval.plots import pictures
from rowint8.eval.report.card import contributed
from rowint8.eval.report.chain import chain_part
from rowint8.eval.report.checks import check_all, read_ceilings
from rowint8.eval.report.engine import commit_of, course_part, engine_part, gaps_table, rates_part
from rowint8.eval.report.kernels import compiler_table, kernel_part, kernel_section, limits, short_table
from rowint8.eval.report.memory import memory_section
from rowint8.eval.report.profile import parts_part, profile_section
from rowint8.eval.report.quality import (
    agreement_cells,
    agreement_section,
    fidelity_line,
    fidelity_section,
    quality_summary,
)
from rowint8.eval.report.serve import serve_part
from rowint8.eval.report.vllm import cost_table
from rowint8.eval.results.files import Environment, Results, read_results
from rowint8.eval.results.schema import (
    AgreementRow,
    ChainRow,
    EngineRow,
    FidelityRow,
    Generation,
    GenerationRow,
    KernelRow,
    ProfileRow,
    QualityRow,
    ServeRow,
    VllmRow,
)
from rowint8.eval.tables import model_of

Found = Mapping[str, Results]
"""Result files by their names without ".json"."""
Section = Callable[[Results], str]
"""Makes Markdown of a result file."""

_CONTRIBUTED = "docs/contributed.md"
"""Blocks of `rowint8 card` from other machines, which are checked."""
_DOCUMENTS = ("README.md", "POSTMORTEM.md", "docs/engine.md", "docs/kernels.md", "docs/quality.md", "docs/vllm.md")
_FILES: dict[str, tuple[type, *tuple[str, ...]]] = {
    "vllm": (VllmRow, "vllm-h200", "vllm-0.33-h200"),
    "vllm-0.26": (VllmRow, "vllm-0.26-h200"),
    "vllm-2": (VllmRow, "vllm-h200x2"),
    "vllm-experts": (VllmRow, "vllm-experts-h200"),
    "engine": (EngineRow, "engine-h200"),
    "engine-cpu": (EngineRow, "engine-cpu"),
    "demo": (GenerationRow, "demo-cpu"),
    "kernels": (KernelRow, "kernels-h200"),
    "kernels-int8": (KernelRow, "kernels-int8-h200"),
    "experts": (KernelRow, "experts-h200"),
    "compiler": (KernelRow, "kernels-compile-h200", "kernels-compile-h100"),
    "chain": (ChainRow, "chain-h200"),
    "profile": (ProfileRow, "profile-h200"),
    "serve": (ServeRow, "serve-h200"),
    "quality": (QualityRow, "quality-h200", "quality-h100"),
    "quality-fp32": (QualityRow, "quality-smollm2"),
    "fidelity": (FidelityRow, "fidelity-a8-smollm2"),
    "fidelity-weights": (FidelityRow, "fidelity-smollm2"),
}
"""What is shown, to the rows and the names of the files that may hold it; the newest counts."""
_OURS = "Written by `rowint8 report`"
_QUALITY: dict[str, Section] = {"quality": quality_summary, "fidelity": fidelity_line}
_CHAPTERS: dict[type, Section] = {
    Generation: rates_part,
    ServeRow: serve_part,
    ProfileRow: profile_section,
    KernelRow: kernel_section,
    ChainRow: chain_part,
    QualityRow: quality_summary,
    FidelityRow: fidelity_section,
    AgreementRow: agreement_section,
}


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
    """What REPORT.md, the cards' pages and the documents with generated parts, where they exist, should be.

    Raises:
        EvalError: a document cannot be read, asks for a part that does not exist, or holds a block that is wrong; or
            somebody else wrote what has the name of the report or of a card's page.
    """
    above = Path(os.path.normpath(folder / ".."))  # not folder.parent, which of "." is "." again
    if (above / _CONTRIBUTED).is_file():
        contributed(_text(above / _CONTRIBUTED), _CONTRIBUTED)
    beside = [above / name for name in _DOCUMENTS]
    filled = {path: fill(_text(path), parts(found), path.name) for path in beside if path.is_file()}
    pages = {folder / f"{name}.md": text for name, text in card_pages(found).items()}
    written = {folder / "REPORT.md": report(found), **pages}
    for path in written:
        if path.is_file() and (text := _text(path)).strip() and _OURS not in text[:1000]:
            raise EvalError(f"{path} is not of `rowint8 report`, which would replace it; give it another name")
    return {**written, **filled}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None


def parts(found: Found) -> dict[str, str]:
    """The generated parts of other documents by the names in their markers; a line where the file is missing."""
    tables: dict[str, Section] = {
        "vllm": rates_part,
        "vllm-0.26": rates_part,
        "vllm-2": rates_part,
        "vllm-experts": rates_part,
        "engine": engine_part,
        "engine-cpu": engine_part,
        "kernels": short_table,
        "compiler": compiler_table,
        "chain": chain_part,
        "profile": parts_part,
        "quality": quality_summary,
        "quality-fp32": quality_summary,
        "fidelity": fidelity_line,
        "fidelity-weights": fidelity_line,
    }
    made = {kind: _part(found, kind, section) for kind, section in tables.items()}
    made |= {"limits": _part(found, "kernels", limits), "agreement": _agreement(found) or TBD}
    rates = read_ceilings(found)
    made["gaps"] = gaps_table([each for kind in ("engine", "vllm") if (each := _newest(found, kind))], rates)
    costs = cost_table(*(_newest(found, kind) for kind in ("vllm", "serve", "fidelity")))
    return made | {"picture": _picture(found), "costs": costs}


def _newest(found: Found, kind: str, others: bool = False) -> tuple[str, Results] | None:
    """Name and content of the newest of the _FILES of a kind; with `others`, without any, of all with such rows."""
    row_type, *stems = _FILES[kind]
    there = [(stem, found[stem]) for stem in stems if stem in found]
    if others and not there:
        there = [item for item in found.items() if isinstance(item[1].rows[0], row_type)]
    return max(there, key=lambda item: item[1].environment.date, default=None)


def _part(found: Found, kind: str, section: Section) -> str:
    newest = _newest(found, kind)
    return section(newest[1]) if newest else f"{TBD}: {_FILES[kind][1]}.json is not measured."


def _picture(found: Found) -> str:
    """The speed of engines, for a document beside the folder."""
    newest = _newest(found, "vllm")
    name = f"{newest[0]}-batch.svg" if newest else ""
    if newest is None or name not in pictures(found):
        return TBD
    where = newest[1].environment
    return f"![speed over bf16 on {where.device}, {model_of(newest[1].command)}](results/{name})"


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
    """REPORT.md: the newest of each kind, the same task for every setup first, and which files there are."""
    sections = {
        "The same model and task in every setup": _course(found),
        "vLLM: prompts (pp) and decoding (tg)": _of(found, "vllm", rates_part),
        "Mixtures of experts in vLLM": _of(found, "vllm-experts", rates_part, others=False),
        "Two GPUs": _of(found, "vllm-2", rates_part, others=False),
        "The small engine, step by step, beside vLLM": _of(found, "engine", rates_part),
        "Serving under load": _of(found, "serve", serve_part),
        "Where a decode step's time goes": _of(found, "profile", parts_part),
        "Kernels": _of(found, "kernels", kernel_part),
        "Kernels of INT8 tokens": _of(found, "kernels-int8", kernel_section, others=False),
        "Kernels of experts": _of(found, "experts", kernel_section, others=False),
        "Layers without attention": _of(found, "chain", chain_part),
        "Memory": memory_section(read_ceilings(found)),
        "Quality": "\n".join(_of(found, kind, section) for kind, section in _QUALITY.items()),
        "Agreement of the two engines": _agreement(found),
        "Files": _files(found),
    }
    cards = sorted({page_of(results.environment) for results in found.values()})
    head = f"# Report\n\n{_OURS} from the files in this folder; do not edit. "
    head += f"All files, a chapter each: {', '.join(f'[{card}]({card}.md)' for card in cards)}. "
    head += f"[metrics.py](../baseline_engine/metrics.py) defines the columns. {_mixture(found)}\n"
    return head + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections.items() if text.strip())


def _course(found: Found) -> str:
    """The table that begins the report, of the small engine beside vLLM, without a picture in front of it."""
    newest = next(filter(None, (_newest(found, kind, True) for kind in ("engine", "vllm", "demo"))), None)
    return f"[{newest[0]}]({newest[0]}.json): {course_part(newest[1])}" if newest else ""


def _of(found: Found, kind: str, section: Section, others: bool = True) -> str:
    """The section of the newest file of a kind, with its picture; empty where there is none."""
    newest = _newest(found, kind, others)
    return _chapter(found, newest[0], section) if newest else ""


def _chapter(found: Found, stem: str, section: Section) -> str:
    drawn = [name for name in pictures(found) if re.fullmatch(rf"{re.escape(stem)}(-[a-z]+)?\.svg", name)]
    shown = "".join(f"![{name}]({name})\n\n" for name in drawn)
    return f"{shown}[{stem}]({stem}.json): {section(found[stem])}\n"


def _mixture(found: Found) -> str:
    commits = {results.environment.git_commit for results in found.values()}
    if len(commits) == 1:
        return "All files are of one commit."
    return (
        f"**The files are of {len(commits)} commits**, named in [Files](#files); older ones measured older kernels. "
        "Compare numbers of one file only."
    )


def card_pages(found: Found) -> dict[str, str]:
    """A page for each card, and one for CPUs: every file of it, whole in a table or two."""
    pages: dict[str, str] = {}
    for stem, results in found.items():
        section = next(section for kind, section in _CHAPTERS.items() if isinstance(results.rows[0], kind))
        name = page_of(results.environment)
        pages.setdefault(name, f"# Everything measured: {name}\n\n{_OURS}; do not edit.\n")
        pages[name] += f"\n## {stem}\n\n{_chapter(found, stem, section)}"
    return pages


def page_of(where: Environment) -> str:
    """Such as "h200", or "cpu"."""
    return where.device.removeprefix("NVIDIA ").split()[0].lower() if where.driver else "cpu"


def _agreement(found: Found) -> str:
    lines = [agreement_cells(*item) for item in found.items() if isinstance(item[1].rows[0], AgreementRow)]
    headings = ["file", "greedy tokens, rowint8", "on", "prompts that agree", "gaps where they part, nats"]
    return table(headings, lines) if lines else ""


def _files(found: Found) -> str:
    """Every file with its machine and versions, and the commands, folded."""
    heading = ["file", "measured", "device", "driver", "python", "torch", "triton", "transformers", "vllm", "commit"]
    lines = []
    for stem, results in found.items():
        env = results.environment
        versions = [env.driver, env.python, env.torch, env.triton, env.transformers, env.vllm]
        told = [env.date[:10], env.device, *(v or "none" for v in versions), commit_of(env)]
        lines.append([f"[{stem}]({stem}.json)", *told])
    commands = "".join(f"{stem}: {results.command}\n" for stem, results in found.items())
    note = "A command's `--json` names the file only. The clients' command lines are in the files of `bench serve`.\n\n"
    return f"{table(heading, lines)}\n" + folded("Commands", f"{note}```\n{commands}```\n")
