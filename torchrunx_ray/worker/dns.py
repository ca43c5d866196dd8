"""Name lookups without DNS, for connections that do not need it.

On every connect, both ends of a TCPStore look up the other's name only to log it. No timeout covers these
lookups. A DNS server that drops the query blocks all ranks for 5 s.
"""

import contextlib
import ctypes
import os
from collections.abc import Generator
from typing import Any


class _ResolverState(ctypes.Structure):
    """The beginning of glibc's `struct __res_state` (resolv.h)."""

    _fields_ = [  # ctypes prescribes the name
        ("retrans", ctypes.c_int),
        ("retry", ctypes.c_int),
        ("options", ctypes.c_ulong),
        ("nscount", ctypes.c_int),
    ]


_threads_of_ours = 1


def threads_are_ours() -> None:
    """Note that all current threads are ours; ours never write to stderr."""
    global _threads_of_ours
    _threads_of_ours = _threads()


def never_ask_dns() -> None:
    """Make name lookups in all threads of this process use only /etc/hosts from now on."""
    configure = _glibc_function("__nss_configure_lookup")
    if configure is not None:
        configure(b"hosts", b"files")


@contextlib.contextmanager
def without_dns() -> Generator[None]:
    """Make this thread's name lookups use only /etc/hosts inside the context.

    Meant for a TCPStore's client. torch writes a line to stderr for every name that is not found; that line is
    dropped if only our own threads run.
    """
    initialise, state_of = _glibc_function("__res_init"), _glibc_function("__res_state")
    if initialise is None or state_of is None:
        yield
        return
    state_of.restype = ctypes.POINTER(_ResolverState)
    initialise()
    state = state_of().contents
    servers, state.nscount = state.nscount, 0
    try:
        with _stderr_shut() if _threads() <= _threads_of_ours else contextlib.nullcontext():
            yield
    finally:
        state.nscount = servers


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _glibc_function(name: str) -> Any:
    """Return a function of glibc; None if the C library is another."""
    return getattr(ctypes.CDLL(None), name, None)


@contextlib.contextmanager
def _stderr_shut() -> Generator[None]:
    """Drop torch's line about the name. Only safe if no other thread may write to stderr."""
    with contextlib.ExitStack() as at_end:
        # The line appears if the function has closed stderr or used up all descriptors.
        with contextlib.suppress(OSError):
            kept = os.dup(2)
            at_end.callback(os.close, kept)
            null = os.open(os.devnull, os.O_WRONLY)
            at_end.callback(os.close, null)
            os.dup2(null, 2)
            at_end.callback(os.dup2, kept, 2)
        yield
