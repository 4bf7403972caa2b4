"""Compiles the Hopper kernel for its card, without one: `python compile_hopper.py`, not under the interpreter.

Prints one JSON object per compilation: its name, shared memory in bytes, and registers, stack and local memory per
thread as the resource report of the compiled binary has them.
"""

import json
import re
import subprocess
import tempfile

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rowint8.kernels.hopper_product import hopper_product
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.kernels.tiles import pick_hopper_tile

SIZES = {"linear": (4096, 28672, 4096, 1), "split": (64, 4096, 4096, 4), "swiglu": (128, 28672, 4096, 1)}
"""Operator to M, N, K of the product whose tile is compiled, and the split that it takes."""


class HopperWithoutDevice:
    """What Triton asks of a driver in order to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_for(name: str) -> list:
    """Launches one product of small tensors with every launch turned into a compilation."""
    m, n, k, split = SIZES[name]
    fused = name == "swiglu"
    tile = pick_hopper_tile("swiglu" if fused else "linear", m, n, k, processors=132)
    assert tile is not None
    assert tile.split == split, f"{name} takes a split of {tile.split}"
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    try:
        weight = quantize_rowwise(torch.randn(512, 512))
        hopper_product(torch.randn(64, 512).bfloat16(), *weight, None, tile, fused)
    finally:
        JITFunction.run = run
    return compiled


def report(name: str, kernel) -> dict:
    """Resources of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return dict(name=name, shared=kernel.metadata.shared, registers=registers, stack=stack, local=local)


if __name__ == "__main__":
    driver.set_active(HopperWithoutDevice())
    for name in SIZES:
        for kernel in compile_for(name):
            print(json.dumps(report(f"{name}: {kernel.metadata.name}", kernel)), flush=True)
