"""What every launcher needs on the host: which compilation a launch takes, and how many programs."""

from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rowint8.kernels.driver import Launcher, TensorMap, make_launcher


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be set up while the one in front of it still runs (9.0 and newer; Triton's `launch_pdl`).

    Such a kernel must wait (`gdc_wait`) before it reads activations or writes anything.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_launchers: dict[tuple, Launcher] = {}
_compiling: dict[tuple, Lock] = {}
"""A lock for each variant, so that two threads do not compile the same."""
_ARITHMETIC = {"enable_fp_fusion": True}
"""A product and a sum become one instruction. Triton's default for it depends on its version."""


def launch(
    kernel: Any, variant: tuple, grid: tuple[int, int, int], arguments: tuple, constants: Mapping, options: Mapping
) -> None:
    """As `kernel[grid](*arguments, **constants, **options)`, in less of the host's time from the second call on.

    Triton finds the compilation of a call by looking at every argument. Here `variant` names it: all that a compilation
    depends on, the name of the kernel first (see `traits`). `constants` are the parameters behind `arguments`. Memory
    that a kernel reads through TMA is given as a `TensorMap`.
    """
    launcher = _launchers.get(variant)
    if launcher is not None:
        launcher(grid, arguments)
        return
    with _compiling.setdefault(variant, Lock()):
        if variant in _launchers:  # meanwhile made by another thread
            return launch(kernel, variant, grid, arguments, constants, options)
        _launch_by_triton(kernel, variant, grid, arguments, constants, options)


def _launch_by_triton(
    kernel: Any, variant: tuple, grid: tuple[int, int, int], arguments: tuple, constants: Mapping, options: Mapping
) -> None:
    """Launches and, where it can, leaves a launcher for the next time."""
    given = [each.descriptor if isinstance(each, TensorMap) else each for each in arguments]
    compiled = kernel[grid](*given, **constants, **options, **_ARITHMETIC)
    if compiled is not None:  # None: interpreted, not compiled
        device = next(each.device for each in arguments if isinstance(each, Tensor))
        launcher = make_launcher(compiled, device)
        if launcher is not None:
            _launchers[variant] = launcher


def traits(*tensors: Tensor | None) -> tuple:
    """What Triton compiles for in tensors: of each its device, its dtype and whether it begins on 16 bytes."""
    return tuple([None if t is None else (t.device, t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`. (`triton.cdiv` takes microseconds on the host.)"""
    return -(-size // block)
