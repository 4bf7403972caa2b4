"""A machine without a GPU that looks like one with a card of every generation, for what happens before a launch.

torch and Triton believe that they see the cards, tensors have shapes but no memory, and kernels can be compiled or
recorded. For scripts of their own, not for the process that runs pytest: `install` changes torch and Triton for good,
and under the interpreter there is nothing to compile.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rowint8.kernels import dispatch, warmup
from rowint8.kernels.add_rms_norm import add_rms_norm
from rowint8.kernels.experts.hopper import Rotation
from rowint8.kernels.experts.launch import experts
from rowint8.kernels.hopper import launch as hopper_launch
from rowint8.kernels.int8_tokens import add_rms_norm_int8, quantize_tokens


class Card(NamedTuple):
    capability: tuple[int, int]
    shared_memory: int
    """Bytes that one program may use."""
    processors: int


CARDS = {
    "sm80": Card((8, 0), 166_912, 108),
    "sm86": Card((8, 6), 101_376, 84),
    "sm89": Card((8, 9), 101_376, 142),
    "sm90": Card((9, 0), 232_448, 132),
    "sm100": Card((10, 0), 232_448, 148),
    "sm120": Card((12, 0), 101_376, 170),
}
"""A100, A40, L40S, H100, B200, RTX 5090: cuda:0 to cuda:5."""


class _Driver:
    """What Triton asks of a driver in order to compile for the current device."""

    current = 0

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        major, minor = _card(self.current).capability
        return GPUTarget("cuda", 10 * major + minor, 32)


_driver = _Driver()


def _card(device: int | torch.device) -> Card:
    return list(CARDS.values())[device.index if isinstance(device, torch.device) else device]


def _properties(device: torch.device) -> SimpleNamespace:
    card = _card(device)
    return SimpleNamespace(
        name=list(CARDS)[device.index],
        shared_memory_per_block_optin=card.shared_memory,
        multi_processor_count=card.processors,
    )


class _InThisThread:
    """A pool without threads: fake tensors and the current fake card are of one thread."""

    def __init__(self, threads: int, **_):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def install() -> None:
    """Makes torch and Triton see CARDS."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    driver.set_active(_driver)
    torch.cuda.get_device_capability = lambda device: _card(device).capability
    torch.cuda.get_device_properties = _properties
    torch.cuda.device = nullcontext
    torch.cuda.synchronize = lambda device: None
    torch.cuda.is_current_stream_capturing = lambda: False
    hopper_launch.ThreadPoolExecutor = warmup.ThreadPoolExecutor = _InThisThread


@contextmanager
def on_card(name: str) -> Iterator[torch.device]:
    """The device of a card, made the current one; tensors of the block are without memory."""
    device = torch.device("cuda", list(CARDS).index(name))
    _driver.current = device.index
    with FakeTensorMode():
        yield device


EXPERTS = {(768, 2048): (128, 8), (14336, 4096): (8, 2), (2880, 2880): (32, 4)}
"""I and H of layers of experts to how many there are and how many a token takes: Qwen3-30B-A3B, Mixtral-8x7B, and
gpt-oss-20b, which has biases and an activation of its own."""


class Launch(NamedTuple):
    """One call of an operator."""

    card: str
    op: str
    m: int
    n: int
    k: int
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16

    def run(self) -> None:
        """Calls the launcher of the kernels; for `add_rms_norm` n is the hidden size, for what rounds tokens to INT8
        the block of the rotation, for experts I, and those with biases are gpt-oss's."""
        with on_card(self.card) as device:
            if self.op.startswith("experts"):
                self._run_experts(device)
                return
            if self.op == "add_rms_norm":
                x = torch.empty(self.m, self.n, dtype=self.dtype, device=device)
                add_rms_norm(x, x, self._vector(self.dtype, device), 1e-5)
                return
            if self.op in ("quantize_tokens", "add_rms_norm_int8"):
                x = torch.empty(self.m, self.k, dtype=self.dtype, device=device)
                if self.op == "quantize_tokens":
                    quantize_tokens(x, self.n)
                else:
                    weight = torch.empty(self.k, dtype=self.dtype, device=device)
                    add_rms_norm_int8(x, x, weight, 1e-5, self.n)
                return
            weight = torch.empty(self.n, self.k, dtype=torch.int8, device=device), self._vector(torch.float16, device)
            bias = self._vector(self.dtype, device) if self.bias else None
            if self.op.endswith("_int8"):
                x = torch.empty(self.m, self.k, dtype=torch.int8, device=device)
                token_scale = torch.empty(self.m, dtype=torch.float32, device=device)
                dispatch.run_int8(self.op, x, token_scale, *weight, bias, self.dtype)
                return
            x = torch.empty(self.m, self.k, dtype=self.dtype, device=device)
            dispatch.run(self.op, x, *weight, bias)

    def _run_experts(self, device: torch.device) -> None:
        many, topk = EXPERTS[self.n, self.k]
        x = torch.empty(self.m, self.k, dtype=self.dtype, device=device)
        shapes = (many, 2 * self.n, self.k), (many, self.k, self.n)
        values = [torch.empty(shape, dtype=torch.int8, device=device) for shape in shapes]
        scales, biases = (
            [torch.empty(shape[:2], dtype=dtype, device=device) for shape in shapes]
            for dtype in (torch.float16, self.dtype)
        )
        weights, ids = (torch.empty(self.m, topk, dtype=each, device=device) for each in (torch.float32, torch.int32))
        layer = values[0], scales[0], values[1], scales[1], weights, ids
        more = (*biases, None, "swigluoai", 1.702, 7.0) if self.bias else (None, None, None, "silu", 1.0, None)
        rotation = Rotation(256, 256) if self.op == "experts_int8" else None
        experts(x, *layer, *more, rotation=rotation)

    def _vector(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(self.n, dtype=dtype, device=device)


def recorded(work: Callable[[], object]) -> set[tuple[str, str]]:
    """(kernel, Triton's key) of every launch of `work`, each of which is a compilation. Nothing is compiled."""
    seen = set()

    def record(*, key, fn, **_):
        seen.add((fn.name, key))
        return True

    knobs.runtime.jit_cache_hook = record
    try:
        work()
    finally:
        knobs.runtime.jit_cache_hook = None
    return seen


def compiled(work: Callable[[], object]) -> list:
    """The kernels that `work` would launch, compiled."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    try:
        work()
    finally:
        JITFunction.run = run
    return kernels
