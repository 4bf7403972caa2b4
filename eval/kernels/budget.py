"""A limit on the time that others may take, so that a benchmark ends when it should."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


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
