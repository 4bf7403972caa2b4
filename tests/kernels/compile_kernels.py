"""Compiles the kernels for every card, on none: `python -m tests.kernels.compile_kernels`, not interpreted.

What is compiled is what the operators launch for the layers of Llama-3.1-8B and any number of tokens, each kernel once.
Prints one JSON object per kernel: card, operator and sizes of a launch, name and tile of the kernel, shared memory in
bytes, tensor memory in columns, and registers, stack and local memory per thread as its binary's resource report has
them.
"""

import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator

import torch
from triton import knobs

from tests.kernels.fake_cards import CARDS, Launch, compiled, install, recorded

PRODUCTS = (
    ("linear", 28672, 4096),
    ("linear", 6144, 4096),
    ("linear", 4096, 4096),
    ("linear", 4096, 14336),
    ("swiglu", 28672, 4096),
    ("swiglu", 3584, 4096),
)
"""Operator, N and K: Llama-3.1-8B's, and its gate and up as one of eight GPUs holds them, where they are narrow."""
TOKENS = (1, *(m for power in range(1, 14) for m in (2**power, 2**power + 1)))
_SOME_TOKENS = (1, 64)
_UNEVEN_K = 4096 + 16
"""What no block divides."""
_OFF_SIXTEEN = 4096 + 8
"""What TMA cannot read, either: a Hopper card then takes the kernels of the others."""


def launches() -> Iterator[Launch]:
    """bf16 with a bias on every card; fp16 without, and K as it rarely is, on some."""
    for card in CARDS:
        yield Launch(card, "add_rms_norm", 1, 4096, 4096)
        for op, n, k in PRODUCTS:
            yield from (Launch(card, op, m, n, k, bias=op == "linear") for m in TOKENS)
    yield Launch("sm90", "add_rms_norm", 1, 4096, 4096, dtype=torch.float16)
    for m in _SOME_TOKENS:
        for op in ("linear", "swiglu"):
            yield Launch("sm90", op, m, 28672, 4096, dtype=torch.float16)
            yield Launch("sm89", op, m, 28672, _UNEVEN_K, dtype=torch.float16)
            yield Launch("sm90", op, m, 28672, _OFF_SIXTEEN)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each kernel."""
    by_kernel: dict[tuple, Launch] = {}
    for launch in launches:
        for kernel in recorded(launch.run):
            by_kernel.setdefault((launch.card, *kernel), launch)
    return list(dict.fromkeys(by_kernel.values()))


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
            **_found_in(kernel.asm["cubin"]),
        )
        for kernel in compiled(launch.run)
    ]


def _tile(kernel) -> str:
    """Tokens x weight rows x K of a program, as far as it has them, warps and stages."""
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    if config := constants.get("config"):
        return f"{config.block_m}x{config.across}*{config.rows}x{config.deep}*{config.block_k}"
    sizes = "x".join(
        str(constants[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK", "CHUNK") if name in constants
    )
    return f"{sizes} w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}"


def _found_in(binary: bytes) -> dict[str, int]:
    """What cuobjdump says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found, text
    resources = dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))
    return resources | _loops_over_k(text)


def _loops_over_k(text: str) -> dict[str, int]:
    """Loops with a wgmma, and instructions in them that move an address from threads to where wgmma wants it."""
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]
    loops = {}
    for end, instruction in code:
        jump = re.match(r"@!?U?P\d BRA.* 0x([0-9a-f]+)", instruction)
        if jump and (begin := int(jump[1], 16)) <= end:
            body = " ".join(what for at, what in code if begin <= at <= end)
            if "HGMMA" in body:
                loops[begin, end] = body.count("R2UR")
    inner = [count for a, count in loops.items() if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return dict(loops_over_k=len(inner), fetched_addresses=sum(inner))


if __name__ == "__main__":
    install()
    with multiprocessing.get_context("fork").Pool() as pool:
        for compilation in pool.imap_unordered(reports, distinct(launches())):
            for report in compilation:
                print(json.dumps(report), flush=True)
