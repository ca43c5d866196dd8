"""Keeping DNS out of connections that do not need it.

Both ends of a TCPStore look up the other's name on every connect, outside of any timeout, only to
log it. A DNS server that drops the question stops all ranks for 5 s.
"""

import contextlib
import ctypes
import os
from collections.abc import Generator
from typing import Any


class _ResolverState(ctypes.Structure):
    """The beginning of glibc's `struct __res_state` (resolv.h)."""

    _fields_ = [  # ctypes' own way
        ("retrans", ctypes.c_int),
        ("retry", ctypes.c_int),
        ("options", ctypes.c_ulong),
        ("nscount", ctypes.c_int),
    ]


_threads_of_ours = 1


def threads_are_ours() -> None:
    """Note that the present threads are ours, which never write to stderr."""
    global _threads_of_ours
    _threads_of_ours = _threads()


def never_ask_dns() -> None:
    """Have look-ups of names in any thread of this process use /etc/hosts only from now on."""
    configure = _glibc_function("__nss_configure_lookup")
    if configure is not None:
        configure(b"hosts", b"files")


@contextlib.contextmanager
def without_dns() -> Generator[None]:
    """Within, this thread's look-ups of names use /etc/hosts only.

    For a TCPStore's client, in place of a line on stderr from torch for every name not found.
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
    """None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None)


@contextlib.contextmanager
def _stderr_shut() -> Generator[None]:
    """Drop torch's line about the name; only where no other thread could write beside it."""
    with contextlib.ExitStack() as at_end:
        # Where the function has closed it, or has used up all descriptors, the line comes.
        with contextlib.suppress(OSError):
            kept = os.dup(2)
            at_end.callback(os.close, kept)
            null = os.open(os.devnull, os.O_WRONLY)
            at_end.callback(os.close, null)
            os.dup2(null, 2)
            at_end.callback(os.dup2, kept, 2)
        yield
