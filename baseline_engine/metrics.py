"""What the numbers mean: every definition of a metric in this project is here. Seconds and bytes throughout.

    TTFT      request to its first token on the host: tokenizing, waiting for earlier prompts, prefill, sampling
    ITL       each gap between two tokens of a request, in order
    TPOT      (end - first token) / (n - 1) of a request with n > 1 tokens: the mean of its gaps
    tok/s     output tokens of all requests / wall time, prefill included
    peak_mem  the device's peak during the run, the weights included: on CUDA the bytes that torch's allocator held
              besides the KV cache, which takes what memory is left; on the CPU the process's resident set, with Python,
              libraries and the blocks of the cache that were ever used
    speedup   baseline time / optimized time

Output tokens include the end-of-sequence token. Loading and compiling come before the clock starts and are given apart.
"""

import statistics
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter

import torch


@dataclass(frozen=True)
class RequestMetrics:
    """The times of one request, on one clock, in seconds."""

    prompt_tokens: int
    start: float
    """When the request was handed in."""
    token_times: tuple[float, ...]
    """When each output token reached the host."""

    @property
    def output_tokens(self) -> int:
        return len(self.token_times)

    @property
    def ttft(self) -> float | None:
        """None where the request failed before its first token."""
        return self.token_times[0] - self.start if self.token_times else None

    @cached_property
    def itl(self) -> list[float]:
        """output_tokens - 1 gaps."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)


@dataclass
class StepTimes:
    """Where the host's time went, summed over steps, and how full the blocks of the KV cache were."""

    seconds: dict[str, float] = field(default_factory=dict)
    """schedule, launch (packing and queueing; on the CPU the computation too), wait (for the device), record."""
    host: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    """Each of the last calls of `Engine.step`, without waiting for the device."""
    steps: int = 0
    """Steps that computed anything."""
    tokens: int = 0
    """Tokens that were computed, prompts included."""
    slots: int = 0
    """Places for a token in the blocks that requests held, summed over steps."""
    filled: int = 0
    """Those of them that hold a token's key and value after the step."""

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        took = perf_counter() - start
        self.seconds[part] = self.seconds.get(part, 0.0) + took
        if part != "wait" and self.host:
            self.host[-1] += took

    def count(self, computed: int, slots: int, filled: int) -> None:
        """Counts a step: the tokens it computes, and the fields above after it."""
        self.steps += computed > 0
        self.tokens += computed
        self.slots += slots
        self.filled += filled

    @property
    def kv_waste(self) -> float:
        """Share of the cache held by requests that holds no token."""
        return 1 - self.filled / self.slots if self.slots else 0.0

    def to_dict(self) -> dict:
        parts = {f"{name}_s": seconds for name, seconds in self.seconds.items()}
        return {"steps": self.steps, "tokens": self.tokens, "kv_waste": self.kv_waste, **parts}


@dataclass(frozen=True)
class RunMetrics:
    """One call of `Engine.generate`: its requests, handed in together."""

    requests: tuple[RequestMetrics, ...]
    wall: float
    """Seconds from the requests to the last token."""
    peak_mem: int
    weight_bytes: int
    load_seconds: float
    """Reading, and with INT8 quantizing, the weights."""
    compile_seconds: float
    """Compiling and capturing at the start; in eager mode INT8 kernels only, on GPUs."""
    steps: StepTimes = field(default_factory=StepTimes)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)

    @property
    def ttft(self) -> float | None:
        """Mean over the requests that have one; None without one."""
        values = [request.ttft for request in self.requests if request.ttft is not None]
        return statistics.fmean(values) if values else None

    @property
    def itl(self) -> float | None:
        """Median over all gaps of all requests; None without one."""
        gaps = [gap for request in self.requests for gap in request.itl]
        return statistics.median(gaps) if gaps else None

    @property
    def tpot(self) -> float | None:
        """Mean over the requests that have one; None without one."""
        values = [request.tpot for request in self.requests if request.tpot is not None]
        return statistics.fmean(values) if values else None

    @property
    def tok_s(self) -> float:
        return self.output_tokens / self.wall

    def to_dict(self) -> dict:
        """For JSON: times of tokens in ms, the rest in seconds and bytes; null where there is no value."""
        return {
            "ttft_ms": _ms(self.ttft),
            "itl_ms": _ms(self.itl),
            "tpot_ms": _ms(self.tpot),
            "tok_s": self.tok_s,
            "wall_s": self.wall,
            "peak_mem_bytes": self.peak_mem,
            "weight_bytes": self.weight_bytes,
            "load_s": self.load_seconds,
            "compile_s": self.compile_seconds,
            "output_tokens": self.output_tokens,
            "steps": self.steps.to_dict(),
            "requests": [_request_dict(request) for request in self.requests],
        }


def speedup(baseline_seconds: float, optimized_seconds: float) -> float:
    """baseline time / optimized time: above 1 where the optimized one is faster."""
    return baseline_seconds / optimized_seconds


class PeakMemory:
    """The peak memory of a device since the last `reset`, in bytes (see peak_mem above).

    On the CPU the kernel's own high-water mark is read, so no peak falls between two samples. Linux can reset it
    (proc(5), clear_refs); where that is refused, and on other systems, the peak is that of the whole process so far.
    """

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None

    def reset(self) -> None:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return

    def read(self) -> int:
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        status = Path("/proc/self/status")
        if status.exists():
            line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _request_dict(request: RequestMetrics) -> dict:
    return {
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "ttft_ms": _ms(request.ttft),
        "tpot_ms": _ms(request.tpot),
        "itl_ms": [_ms(gap) for gap in request.itl],
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
