"""The operators in plain torch, which eager mode is timed with, and torch.compile: what Inductor says it made."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import silu

from rowint8.eval.results.schema import Compilation

EPS = 1e-5
MODES = {"compiled": "default", "compiled_max_autotune": "max-autotune-no-cudagraphs"}
"""Names in results and torch.compile's mode. Without its CUDA graphs, since the timing captures its own."""

_FUSION = "torch._inductor.scheduler.__fusion"
_CODE = "torch._inductor.codecache.__output_code"
_LOG_LINES = 60
_ANSI = re.compile(r"\x1b\[[\d;]*m")
_TELLING = ("SchedulerNode(", "ExternKernelSchedulerNode(", "cannot fuse", "can fuse", "fusing", "completed fusion")
"""Starts of the lines that say what there was and why it was fused or not."""


def linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`ops.linear` in plain torch: [M, K] -> [M, N] in x's dtype; values int8 [N, K], scale fp16 [N]."""
    return dense_linear(x, values.to(x.dtype)) * scale.to(x.dtype)


def swiglu(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`ops.swiglu` in plain torch: [M, K] -> [M, I] in x's dtype; values int8 [2I, K], scale fp16 [2I]."""
    return silu_and_mul(linear(x, values, scale))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[M, 2I] -> [M, I]; in eager mode two of torch's kernels."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm` as Hugging Face's `LlamaRMSNorm` computes it: (normed, total), both [M, H] in x's dtype."""
    total = x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype), total


def compile_logged(
    expression: Callable, arguments: tuple, mode: str, dynamic: bool | None = False
) -> tuple[Callable, Any, Compilation | None]:
    """Compiles `expression` for the sizes of `arguments`; with `dynamic` None, for any size that is marked as dynamic.

    Caches are not used: a cached graph is not fused again, so nothing would be said about it.

    Returns:
        The compiled function, its result for `arguments`, what was generated; None where Inductor logged no code.
    """
    import torch._functorch.config as aot
    import torch._inductor.config as inductor

    compiled = torch.compile(expression, mode=mode, dynamic=dynamic)
    uncached = inductor.patch(fx_graph_cache=False), aot.patch(enable_autograd_cache=False)
    with uncached[0], uncached[1], _messages(_CODE) as code, _messages(_FUSION) as fusion:
        result = compiled(*arguments)
    return compiled, result, _compilation("\n".join(code), fusion) if code else None


def _compilation(code: str, fusion: list[str]) -> Compilation:
    kernels = re.findall(r"^(\w+) = async_compile\.\w+\(", code, re.MULTILINE)
    extern = re.findall(r"(?:extern_kernels|torch\.ops)\.[\w.]+(?=\()", code)
    lines = (_ANSI.sub("", message.partition(", 'stack_traces")[0]).strip() for message in fusion)
    log = [line for line in dict.fromkeys(lines) if line.startswith(_TELLING)]
    return Compilation(kernels=tuple(kernels), extern=tuple(extern), log=tuple(log[:_LOG_LINES]))


@contextmanager
def _messages(logger_name: str) -> Iterator[list[str]]:
    """Collects what a logger is told, down to its details, and keeps it from being printed."""
    collected: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected.append(record.getMessage())

    logger, handler = logging.getLogger(logger_name), Collect()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield collected
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
