"""Compiles the kernels for every card, on none: `python -m tests.kernels.compile_kernels`, not interpreted.

What is compiled is what the operators launch for the layers of Llama-3.1-8B, for the experts of three models and for
any number of tokens, each kernel once. Prints one JSON object per kernel: card, operator and sizes of a launch, name
and tile of the kernel, shared memory in bytes, tensor memory in columns, and registers, stack and local memory per
thread as its binary's resource report has them. `--few` takes a quarter of the kernels.

`--code FOLDER` instead writes the PTX and the disassembly of each kernel, without its name and its source's lines.
`--compare BEFORE AFTER` says how the code in two such folders differs, and exits with 1 where it does.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from triton import knobs

from rowint8.kernels.experts.warmup import tokens_by_tile
from rowint8.kernels.tiles.card import card_of
from tests.kernels.fake_cards import CARDS, EXPERTS, Launch, compiled, install, on_card, recorded

PRODUCTS = (
    ("linear", 28672, 4096),
    ("linear", 6144, 4096),
    ("linear", 4096, 4096),
    ("linear", 4096, 14336),
    ("swiglu", 28672, 4096),
    ("swiglu", 3584, 4096),
)
"""Operator, N and K: Llama-3.1-8B's, and its gate and up as one of eight GPUs holds them, where they are narrow."""
QWEN3, MIXTRAL, GPT_OSS = EXPERTS
MOST_TOKENS = 8192
"""Of experts, in a step."""
TOKENS = (1, *(m for power in range(1, 14) for m in (2**power, 2**power + 1)), 41, 81, 145, 161, 193)
_SOME_TOKENS = (1, 64)
_UNEVEN_K = 4096 + 16
"""What no block divides."""
_OFF_SIXTEEN = 4096 + 8
"""What TMA cannot read, either: a Hopper card then takes the kernels of the others."""


def launches() -> Iterator[Launch]:
    """bf16 with a bias on every card; experts, INT8 tokens, fp16 without a bias, and K as it rarely is, on some."""
    for card in CARDS:
        yield Launch(card, "add_rms_norm", 1, 4096, 4096)
        for op, n, k in PRODUCTS:
            yield from (Launch(card, op, m, n, k, bias=op == "linear") for m in TOKENS)
    for card in ("sm80", "sm90", "sm120"):
        yield from (Launch(card, "add_rms_norm_int8", 1, block, 4096) for block in (1, 64, 256))
        yield from (Launch(card, "quantize_tokens", 1, block, 14336) for block in (16, 256))
        for op, n, k in PRODUCTS if card == "sm90" else PRODUCTS[::4]:
            yield from (Launch(card, f"{op}_int8", m, n, k, bias=op == "linear") for m in TOKENS)
    for card in ("sm80", "sm90", "sm100", "sm120"):
        yield from experts(card, "experts", *QWEN3)
    yield from experts("sm90", "experts_int8", *QWEN3)
    yield from experts("sm90", "experts", *MIXTRAL)
    yield from experts("sm90", "experts_int8", *MIXTRAL)
    yield from experts("sm90", "experts", *GPT_OSS)
    yield Launch("sm90", "add_rms_norm", 1, 4096, 4096, dtype=torch.float16)
    for m in _SOME_TOKENS:
        for op in ("linear", "swiglu"):
            yield Launch("sm90", op, m, 28672, 4096, dtype=torch.float16)
            yield Launch("sm89", op, m, 28672, _UNEVEN_K, dtype=torch.float16)
            yield Launch("sm90", op, m, 28672, _OFF_SIXTEEN)


def experts(card: str, op: str, i: int, h: int) -> Iterator[Launch]:
    """One launch for each tile that experts of these sizes take."""
    (many, topk), bias = EXPERTS[i, h], (i, h) == GPT_OSS
    with on_card(card) as device:
        by_tma = bool(card_of(device).hopper_processors) and not bias
        itemsize = 1 if op == "experts_int8" else 2
        for m in tokens_by_tile(topk, many, itemsize, device, MOST_TOKENS, by_tma).values():
            yield Launch(card, op, m, i, h, bias)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each kernel."""
    by_kernel: dict[tuple, Launch] = {}
    for launch in launches:
        for kernel in recorded(launch.run):
            by_kernel.setdefault((launch.card, *kernel), launch)
    return list(dict.fromkeys(by_kernel.values()))


def few(launches: list[Launch]) -> list[Launch]:
    """The one for the most tokens of every kernel that an operator takes on a card, and on sm90 that a layer takes; of
    experts, whose kernels take longest to compile, one for the fewest tokens on each card."""
    chosen: dict[tuple, Launch] = {}
    for launch in launches:
        for name, _ in recorded(launch.run):
            if launch.op.startswith("experts"):
                chosen.setdefault((launch.card, launch.op, name), launch)
                continue
            kind = launch.card, launch.op, name, (launch.n, launch.k) if launch.card == "sm90" else None
            chosen[kind] = max(chosen.get(kind, launch), launch, key=lambda each: each.m)
    return list(dict.fromkeys(chosen.values()))


def reports(launch: Launch) -> list[dict]:
    """Compiles what the launch needs."""
    return [
        dict(
            card=launch.card,
            op=launch.op,
            m=launch.m,
            n=launch.n,
            k=launch.k,
            kernel=kernel.metadata.name,
            tile=_tile(kernel),
            shared=kernel.metadata.shared,
            tensor_memory=kernel.metadata.tmem_size,
            **_resources(kernel),
        )
        for kernel in compiled(launch.run)
    ]


def _tile(kernel) -> str:
    """Tokens x weight rows x K of a program, as far as it has them, warps and stages."""
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    if config := constants.get("config"):
        return f"{config.block_m}+{config.tail}x{config.across}*{config.rows}x{config.deep}*{config.block_k}"
    sizes = "x".join(
        str(constants[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK", "CHUNK") if name in constants
    )
    return f"{sizes} w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}"


def _cuobjdump(binary: bytes, *options: str) -> str:
    """What it says of a binary: with `-res-usage` the resources that it takes, with `-sass` its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(kernel) -> dict[str, int]:
    """Numbers from a kernel's binary; of a Hopper kernel's loops, too, as instructions take long to list."""
    text = _cuobjdump(kernel.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found, text
    resources: dict[str, int] = dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))
    if kernel.metadata.name != "hopper_kernel":
        return resources
    return resources | _loops_over_k(_cuobjdump(kernel.asm["cubin"], "-sass"))


def _loops_over_k(text: str) -> dict[str, int]:
    """Loops with a wgmma, and instructions in them that move an address from threads to where wgmma wants it, or that
    reach for what registers had no room for."""
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]
    loops = {}
    for end, instruction in code:
        jump = re.match(r"@!?U?P\d BRA.* 0x([0-9a-f]+)", instruction)
        if jump and (begin := int(jump[1], 16)) <= end:
            body = " ".join(what for at, what in code if begin <= at <= end)
            if "HGMMA" in body or "IGMMA" in body:
                loops[begin, end] = body.count("R2UR"), body.count("LDL") + body.count("STL")
    inner = [counts for a, counts in loops.items() if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    fetched, spilled = (sum(counts) for counts in zip(*inner, strict=True)) if inner else (0, 0)
    return dict(loops_over_k=len(inner), fetched_addresses=fetched, spilled_in_loops=spilled)


def write_code(folder: Path, launch: Launch) -> list[str]:
    """Writes a .ptx and a .sass for what the launch needs, named after the launch; the names."""
    kernels = compiled(launch.run)
    card, op, m, n, k, bias, dtype = launch
    names = [f"{card}-{op}-{m}x{n}x{k}-{dtype}-{bias}-{i}".replace("torch.", "") for i in range(len(kernels))]
    for name, kernel in zip(names, kernels, strict=True):
        entry, sass = kernel.metadata.name, _cuobjdump(kernel.asm["cubin"], "-res-usage", "-sass")
        (folder / f"{name}.ptx").write_text(re.sub(" *//.*", "", kernel.asm["ptx"]).replace(entry, "kernel"))
        (folder / f"{name}.sass").write_text("\n".join(line.replace(entry, "kernel") for line in _code_lines(sass)))
    return names


def _code_lines(sass: str) -> Iterator[str]:
    """Resources and instructions, without addresses and encodings."""
    yield from re.findall(r"REG:.*", sass)
    yield from re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+;)", sass)


def compare(before: Path, after: Path) -> Counter[str]:
    """Prints the kernels whose code differs; how many there are of each outcome."""
    outcomes: Counter[str] = Counter()
    for name in sorted({file.stem for folder in (before, after) for file in folder.glob("*.ptx")}):
        outcome = _outcome(before / name, after / name)
        outcomes[outcome.split(":")[0]] += 1
        if outcome != "same PTX":
            print(f"{name} {outcome}")
    return outcomes


def _outcome(before: Path, after: Path) -> str:
    """What is the same of a kernel, or else what its binaries take; the paths are without suffixes."""
    if not all(each.with_suffix(".ptx").exists() for each in (before, after)):
        return "missing"
    if len({each.with_suffix(".ptx").read_text() for each in (before, after)}) == 1:
        return "same PTX"
    texts = [each.with_suffix(".sass").read_text().splitlines() for each in (before, after)]
    if texts[0] == texts[1]:
        return "same SASS"
    taken = [re.sub(r" (TEXTURE|SURFACE|SAMPLER).*", "", text[0]) + f", {len(text)} instructions" for text in texts]
    gone = sum((Counter(texts[0]) - Counter(texts[1])).values())
    return f"different: {taken[0]} -> {taken[1]}, {gone} of the former are gone"


def _compile_all(work: Callable[[Launch], list], choose: Callable = list) -> Iterator:
    install()
    with multiprocessing.get_context("fork").Pool() as pool:
        for done in pool.imap_unordered(work, choose(distinct(launches()))):
            yield from done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--code", type=Path, metavar="FOLDER")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    given = parser.parse_args()
    if given.compare:
        outcomes = compare(*given.compare)
        print(dict(outcomes))
        sys.exit(set(outcomes) != {"same PTX"})
    if given.code:
        given.code.mkdir(parents=True)
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
        print(len(list(_compile_all(partial(write_code, given.code)))), "kernels")
    else:
        for report in _compile_all(reports, few if given.few else list):
            print(json.dumps(report), flush=True)
