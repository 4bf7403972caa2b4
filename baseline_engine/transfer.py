"""Host to device without waiting."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: Any = np.int32) -> Tensor:
    """An array, or lists of numbers, as a tensor on `device`. To a GPU the copy is queued from pinned memory."""
    return _sendable(np.asarray(values, dtype=dtype), device).to(device, non_blocking=True)


def send(values: np.ndarray, out: Tensor) -> None:
    """Copies an array into a tensor of its dtype and shape, as `to_device` does, but to where it is read."""
    out.copy_(_sendable(values, out.device), non_blocking=True)


def _sendable(values: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host
