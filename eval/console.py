"""What the commands show besides their results."""

import psutil

BUSY_PERCENT = 20.0


def busy_warning(seconds: float = 1.0) -> str | None:
    """A line for people where other programs use the CPU, observed for `seconds` before anything is measured."""
    busy = psutil.cpu_percent(seconds)
    if busy < BUSY_PERCENT:
        return None
    return f"other programs keep {busy:.0f}% of the CPU busy: times measured now say little; stop them first"
