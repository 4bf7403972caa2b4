"""The commands `rowint8 doctor` and, once something is measured, `rowint8 card`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from rowint8.eval.cli.output import Json, answer, err, out, say
from rowint8.eval.cli.quantize import TrustRemoteCode
from rowint8.eval.models import MODELS
from rowint8.eval.tables import Table

if TYPE_CHECKING:
    from rowint8.eval.doctor import Estimate, Gpu
    from rowint8.eval.quantize.sizes import ModelSizes
    from rowint8.eval.results.files import Environment

Model = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(help=f"A folder with a config.json, a hub name, or {', '.join(MODELS)}. No weights are read."),
]
_GIB = 2**30


def doctor(model: Model = None, trust_remote_code: TrustRemoteCode = False, json_file: Json = None) -> None:
    """Say what rowint8 can do here: versions, GPUs, kernels, whether vLLM sees the plugin; what MODEL weighs, how fast.

    Example: rowint8 doctor Qwen/Qwen2.5-7B-Instruct

    Example: rowint8 doctor llama-3.1-8b --json doctor.json
    """
    from rowint8.eval import doctor as job
    from rowint8.eval.quantize.sizes import read_sizes
    from rowint8.eval.results.environment import describe_environment
    from rowint8.eval.writing import write_file

    with err.status("looking at the model and the machine"):
        sizes = read_sizes(model, trust_remote_code) if model is not None else None
        environment, found, problem = describe_environment(), job.gpus(), job.plugin_problem()
    out.print(machine_table(environment, found, problem))
    facts: dict[str, Any] = {"environment": asdict(environment), "gpus": [asdict(gpu) for gpu in found]}
    facts |= {"plugin_problem": problem}
    if sizes is not None:
        estimates, advice = job.estimates(sizes, found), job.advice(sizes, found)
        out.print(
            model_table(sizes, estimates), *(f"- {line}" for line in advice), sep="\n", markup=False, highlight=False
        )
        facts |= {"model": asdict(sizes), "estimates": [asdict(each) for each in estimates], "advice": advice}
    if json_file is not None:
        write_file(json_file, json.dumps(facts, indent=2) + "\n")
        say(f"wrote {json_file}")


def card(
    model: Annotated[str, typer.Argument(help="What was measured: a folder with a config.json, or a hub name.")],
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Result files of it: of bench, quality or fidelity.")
    ],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print one block of results, with machine, versions and model, for docs/contributed.md. Measures nothing.

    Example: rowint8 bench vllm --model DIR --setups bf16,rowint8 --json mine.json && rowint8 card DIR mine.json
    """
    from rowint8.eval.quantize.sizes import read_sizes
    from rowint8.eval.report.card import card_block
    from rowint8.eval.results.files import read_results

    found = {path.name: read_results(path) for path in files}
    with err.status("looking at the model"):
        sizes = read_sizes(model, trust_remote_code)
    name = Path(model).resolve().name if Path(model).is_dir() else model
    answer(card_block(replace(sizes, model=name), found))


def machine_table(environment: "Environment", found: list["Gpu"], problem: str | None) -> Table:
    """Versions, GPUs and their kernels, the plugin."""
    versions = (
        f"rowint8 {environment.rowint8}, Python {environment.python}, torch {environment.torch}, "
        f"Triton {environment.triton or 'not installed'}, vLLM {environment.vllm or 'not installed'}"
    )
    lines = [("versions", versions), ("plugin", problem or "vLLM knows --quantization rowint8")]
    for gpu in found:
        lines += _gpu_lines(gpu)
    if not found:
        lines.append(("GPU", f"none that torch sees; the CPU ({environment.device}) runs plain torch: for trials"))
    return Table(("what", "this machine"), lines, words=2)


def _gpu_lines(gpu: "Gpu") -> list[tuple[str, str]]:
    capability = ".".join(map(str, gpu.capability))
    many = f"{gpu.count} x " if gpu.count > 1 else ""
    about = f"{many}{gpu.name}: {gpu.generation}, compute capability {capability}, {gpu.memory_bytes / _GIB:.0f} GiB"
    if not gpu.kernels:
        return [("GPU", f"{about}; the kernels need Ampere (8.0) or newer")]
    kernels = [f"{tokens}: {kernel}" for tokens, kernel in gpu.kernels.items()]
    return [
        ("GPU", about),
        ("kernels", f"by tokens in a step: {'; '.join(kernels)}"),
        ("INT8 activations", gpu.no_int8_activations or "this card multiplies them"),
    ]


def model_table(sizes: "ModelSizes", estimates: list["Estimate"]) -> Table:
    """Bytes and estimated rates, a line for each card and form."""
    from rowint8.eval.doctor import CEILINGS, LAYER_US

    lines = [
        (each.card, each.form, f"{sizes.weights[each.form] / _GIB:.2f}", f"{each.about:.0f}", f"{each.at_most:.0f}")
        for each in estimates
    ]
    rates = ", ".join(f"{card} {CEILINGS[card]:.2f}" for card in dict.fromkeys(each.card for each in estimates))
    note = (
        "Estimates for one request and a short context. At most: the weights that a token needs are read once at the "
        f"measured rate (TB/s: {rates}). About: in vLLM, where a layer takes {LAYER_US:.0f} us besides."
    )
    headings = ("card", "linear weights", "size, GiB", "about tok/s", "at most tok/s")
    experts = " and the experts" if sizes.has_experts else ""
    title = f"{sizes.model}: {sizes.linear_layers} linear layers{experts} become INT8"
    return Table(headings, lines, title=title, note=note, words=2, grouped=True)
