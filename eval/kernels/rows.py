"""Rows of kernel times: what the benchmarks of operators share, and the time that others may take in them."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from rowint8.eval.kernels.shapes import Shape
from rowint8.eval.kernels.timing import Call, Replay, capture, in_turns, paired_ratio, summary
from rowint8.eval.results.gpu_clock import sm_mhz
from rowint8.eval.results.schema import Compilation, KernelRow

T = TypeVar("T")

Candidates = dict[str, list[Call]]
"""Name to the calls that are timed one after the other: one per copy of the weight."""

CUBLAS = {torch.bfloat16: "cublas_bf16", torch.float16: "cublas_fp16"}
_HOST_CALLS = 32
"""Few enough for the GPU's queue, so that none waits for room in it."""
_AGREE = 0.02


class Budget:
    """Seconds that each name may take over a whole run, to pack weights, compile and tune itself.

    Whoever fails, or has used up its seconds, is left out from then on; `announce` is told so once. Work in progress is
    not interrupted: the last piece may go beyond the limit, and its result still counts.
    """

    def __init__(self, seconds: Mapping[str, float], announce: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._announce = announce
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._left_out: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._seconds

    def run(self, name: str, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where `name` is left out, or is so from now on because `work` raised."""
        if name in self._left_out:
            return None
        start = time.perf_counter()
        result = self.attempt(name, work)
        self._spent[name] += time.perf_counter() - start
        if name not in self._left_out and self._spent[name] > self._seconds[name]:
            spent, limit = self._spent[name], self._seconds[name]
            self._leave_out(name, f"it has taken {spent:.0f} s, of {limit:.0f} s allowed", "from here ")
        return result

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """As `run`, for short work: it counts nothing, and is done even if `name` has just used up its seconds."""
        try:
            return work()
        except Exception as error:  # it is other people's code: whatever it raises, the rest is measured
            self._leave_out(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            return None

    def left_s(self, name: str) -> float:
        """Seconds that `name` has left, at least 0."""
        return max(self._seconds[name] - self._spent[name], 0)

    def _leave_out(self, name: str, reason: str, when: str = "") -> None:
        self._left_out.add(name)
        self._announce(f"{when}without {name}: {reason}")


class RowBench:
    """Times candidates beside one another, a row at a time.

    Args:
        dtype: of the activations, bf16 or fp16.
        announce: is told who is left out and why, and how long the others took to get ready.
        ready_s: seconds that others may take to get ready; see `Budget`.
        device, capture: for tests.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        announce: Callable[[str], None],
        ready_s: Mapping[str, float],
        device: str = "cuda",
        capture: Callable[[Sequence[Call]], Replay] = capture,
    ) -> None:
        self._dtype, self._device, self._capture = dtype, device, capture
        self._announce = announce
        self._budget = Budget(ready_s, announce)

    def _row(
        self,
        op: Any,
        shape: Shape,
        m: int,
        candidates: Candidates,
        facts: Mapping[str, Compilation] | None = None,
    ) -> KernelRow:
        before = sm_mhz()
        captured = {name: self._captured(name, calls) for name, calls in candidates.items()}
        times = in_turns({name: replay for name, replay in captured.items() if replay})
        after = sm_mhz()
        on_host = [name for name in times if name in ("rowint8", CUBLAS[self._dtype])]
        us, spread = ({name: summary(each)[part] for name, each in times.items()} for part in (0, 1))
        others = {name: each for name, each in times.items() if name != "rowint8"}
        return KernelRow(
            op=op,
            shape=shape.name,
            dtype="bfloat16" if self._dtype == torch.bfloat16 else "float16",
            M=m,
            N=shape.n,
            K=shape.k,
            us=us,
            spread=spread,
            paired={name: paired_ratio(times["rowint8"], each) for name, each in others.items()} or None,
            sm_mhz=(before, after) if before and after else None,
            host_us={name: self._host_us(candidates[name]) for name in on_host},
            compiler=dict(facts) if facts else None,
        )

    def _captured(self, name: str, calls: list[Call]) -> Replay | None:
        """None where others cannot be captured or run out of memory."""
        work = partial(self._capture, calls)
        return self._budget.attempt(name, work) if name in self._budget else work()

    def _host_us(self, calls: list[Call]) -> float:
        self._finished(None)
        start = time.perf_counter()
        for call in islice(cycle(calls), _HOST_CALLS):
            call()
        us = (time.perf_counter() - start) / _HOST_CALLS * 1e6
        self._finished(None)
        return us

    def _is_ready(self, name: str, calls: list[Call], reference: Any) -> bool:
        """Whether the first call, which may tune itself, ends within the budget and computes what it should."""
        if name not in self._budget:
            return True
        return bool(calls) and bool(self._budget.run(name, lambda: check_agrees(self._finished(calls[0]()), reference)))

    def _finished(self, result: Any) -> Any:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return result

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self._device, dtype=self._dtype)


def check_agrees(out: Any, reference: Any, within: float = _AGREE) -> bool:
    """True.

    Raises:
        ValueError: the first results differ by more than the rounding of a 16-bit intermediate explains.
    """
    first, expected = (each[0] if isinstance(each, tuple) else each for each in (out, reference))
    error = float((first.float() - expected.float()).norm() / expected.float().norm())
    if not error < within:
        raise ValueError(f"it computes something else: relative difference {error:.3f}")
    return True
