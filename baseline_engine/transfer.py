"""Host to device without waiting."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: Any = np.int32) -> Tensor:
    """An array, or lists of numbers, as a tensor on `device`. To a GPU the copy is queued from pinned memory."""
    host = torch.from_numpy(np.asarray(values, dtype=dtype))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
