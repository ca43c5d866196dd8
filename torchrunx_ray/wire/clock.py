"""The only place that reads clocks whose times other processes use.

Wall-clock time orders failures of different hosts. Leases need a clock that nobody sets.
"""

import time


def now_ns() -> int:
    return time.time_ns()


def boot_ns() -> int:
    """Return the time since the machine was booted, in which it may have been suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
