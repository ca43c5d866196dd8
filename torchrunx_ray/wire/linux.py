"""System calls, some of which not every Python build offers.

conda's Python, which Ray's own images use, is built on systems older than these calls. So conda's Python lacks them
even on a newer kernel.
"""

import ctypes
import mmap
import os
import platform
import select
import time
from collections.abc import Iterable
from typing import Any, NoReturn

_PIDFD_OPEN = 434
_MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}
_CLOSE_ON_EXEC = 1
_ABSOLUTE = 1
_TIMER_CLOSE_ON_EXEC = 0o2000000
_NS_PER_S = 10**9

PAGE_SIZE = mmap.PAGESIZE


def pidfd_open(pid: int) -> int:
    """Return a descriptor that becomes readable when the process ends."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    return _call(_PIDFD_OPEN, pid, 0)


def ready(fds: Iterable[int], timeout_s: float | None = None) -> list[int]:
    """Wait until some of the descriptors are readable, and return these. A pidfd is readable after its process ended.

    Return an empty list after `timeout_s`.
    """
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)]


def memory_file(name: str) -> int:
    """Return the descriptor of a new file in memory, which is in no folder; `name` only helps debugging."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    return _call(_MEMFD_CREATE[platform.machine()], name.encode(), _CLOSE_ON_EXEC)


def map_page(fd: int, *, is_writable: bool) -> int:
    """Map the first page of a file, shared with all who map it, and return its address.

    Python's own `mmap` would keep a copy of the descriptor open (before 3.13, always).
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    address: int = _libc.mmap(None, PAGE_SIZE, protection, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        _raise_error()
    return address


def unmap_page(address: int) -> None:
    _libc.munmap(address, PAGE_SIZE)


def boot_timer() -> int:
    """Return the descriptor of a timer on the clock of `clock.boot_ns`; it is not set.

    Unlike a timeout of poll, the timer also counts the time in which the machine is suspended.
    """
    return _checked(_libc.timerfd_create(time.CLOCK_BOOTTIME, _TIMER_CLOSE_ON_EXEC))


def set_boot_timer(fd: int, at_ns: int) -> None:
    """Make the timer readable from this time on, and not before. 0 unsets the timer."""
    # struct itimerspec: the interval, then the time, each as seconds and nanoseconds.
    spec = (ctypes.c_long * 4)(0, 0, *divmod(at_ns, _NS_PER_S))
    _checked(_libc.timerfd_settime(fd, _ABSOLUTE, ctypes.byref(spec), None))


def _call(number: int, *arguments: int | bytes) -> int:
    return _checked(_libc.syscall(number, *arguments))


def _checked(result: int) -> int:
    if result < 0:
        _raise_error()
    return result


def _raise_error() -> NoReturn:
    error = ctypes.get_errno()
    raise OSError(error, os.strerror(error))


_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value
