"""The clock of a GPU's multiprocessors, which a card lowers when it grows hot or draws too much power."""

import ctypes
from collections.abc import Callable
from functools import cache

_LIBRARY = "libnvidia-ml.so.1"
"""Comes with the driver; the package pynvml, which is not always there, calls the same."""
_SM = 1


def sm_mhz() -> int | None:
    """The clock now of the GPU that torch uses; None where there is none or the driver does not tell."""
    read = _reader()
    return read() if read else None


@cache
def _reader() -> Callable[[], int | None] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    device, clock = ctypes.c_void_p(), ctypes.c_uint()
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        nvml = ctypes.CDLL(_LIBRARY)
        failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device))
    except (OSError, AttributeError):
        return None
    if failed:
        return None
    return lambda: None if nvml.nvmlDeviceGetClockInfo(device, _SM, ctypes.byref(clock)) else clock.value
