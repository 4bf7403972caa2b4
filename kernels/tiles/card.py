"""What the choice of a tile asks of a card."""

from functools import cache
from typing import NamedTuple

import torch
import triton


class Card(NamedTuple):
    """A GPU, as far as tiles depend on it."""

    shared_memory: int
    """Bytes of shared memory that one program may use."""
    hopper_processors: int
    """Multiprocessors of a card that runs the Hopper kernel (compute capability 9.0); 0 for any other."""


_INTERPRETER = Card(232_448, 0)
"""Has the shared memory of an H100."""


@cache
def card_of(device: torch.device) -> Card:
    """The card of a CUDA device. Tensors on a CPU are for Triton's interpreter, which has no limits of its own."""
    if device.type != "cuda":
        return _INTERPRETER
    card = torch.cuda.get_device_properties(device)
    on_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return Card(card.shared_memory_per_block_optin, card.multi_processor_count if on_hopper else 0)


def why_weight_only(device: torch.device) -> str | None:
    """Why the card does not multiply INT8 tokens fast, if so."""
    return why_slow_in_int8(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def why_slow_in_int8(capability: tuple[int, int]) -> str | None:
    """Why a card of this compute capability does not multiply INT8 tokens fast, if so."""
    if capability == (10, 3):
        return "its tensor cores are slow in INT8"
    if capability[0] == 10 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        return f"Triton {triton.__version__} does not use its tensor cores for INT8; 3.9 does"
    return None
