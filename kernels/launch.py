"""What every launcher and kernel needs once: which kernel, the interpreter's dtype rule, the order of tiles."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from rowint8.kernels.tiles.pick import TileConfig

_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype that the operands of a product take for activations of `dtype`.

    That is the activation dtype itself (INT8 values are exact in all three), except under TRITON_INTERPRET=1, whose
    dot of bf16 operands is silently wrong: there both operands are widened to fp32.
    """
    return tl.float32 if knobs.runtime.interpret else _TRITON_DTYPE[dtype]


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be set up while the one in front of it still runs (9.0 and newer; Triton's `launch_pdl`).

    Such a kernel must wait (`gdc_wait`) before it reads activations or writes anything.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any, variant: tuple, grid: tuple[int, int, int], arguments: tuple, constants: Mapping, options: Mapping
) -> None:
    """As `kernel[grid](*arguments, **constants, **options)`, in less of the host's time from the second call on.

    Triton finds the compilation of a call by looking at every argument. Here `variant` names it: all that a compilation
    depends on, the name of the kernel first (see `traits`). `constants` are the parameters behind `arguments`.
    """
    compiled = _compiled.get(variant)
    if compiled is not None:
        compiled[grid](*arguments, *constants.values())
        return
    compiled = kernel[grid](*arguments, **constants, **options)
    if compiled is not None:  # None: interpreted, not compiled
        _compiled[variant] = compiled


@cache
def product_constants(
    tile: TileConfig, k: int, dtype: torch.dtype, device: torch.device, **first: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of the product kernels that run a tile, in their order behind `first`, and options for compiling."""
    pdl = tile.overlaps and dependent_launch(device)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl)
    rows = dict(BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    last = dict(EVEN_K=k % tile.block_k == 0, DOT=dot_dtype(dtype), PDL=pdl)
    if tile.block_m == 1:
        return {**first, **rows, **last}, options
    return {**first, "BLOCK_M": tile.block_m, **rows, "SLICES": tile.slices, "GROUP": tile.group, **last}, options


def traits(*tensors: Tensor | None) -> tuple:
    """What Triton compiles for in tensors: of each its device, its dtype and whether it begins on 16 bytes."""
    return tuple(None if t is None else (t.device, t.dtype, t.data_ptr() % 16 == 0) for t in tensors)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`. (`triton.cdiv` takes microseconds on the host.)"""
    return -(-size // block)


@triton.jit
def grid_position(tiles_m, tiles_n, GROUP: tl.constexpr):
    """(pid_m, pid_n) of this program: GROUP row blocks of the weight at a time, all token blocks over them.

    Programs that run together then share their weight rows and their tokens in L2.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_m)
    first_n = group * GROUP
    width = tl.minimum(tiles_n - first_n, GROUP)
    within = pid - group * GROUP * tiles_m
    return within // width, first_n + within % width
