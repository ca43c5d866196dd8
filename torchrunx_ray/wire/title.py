"""Titles of our processes, as ps, top and py-spy show them.

A title overwrites the arguments that the process was started with. Every fork has its own copy of the arguments.
"""

import contextlib
import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrunx_ray.wire import proc
from torchrunx_ray.wire.values import memory

PADDING = " " * 128
"""Last argument of our interpreters: room for a title."""

_PR_SET_NAME = 15
_NAME_SIZE = 15
_END = b"\0"
_libc: Any = ctypes.CDLL(None)


@dataclass(frozen=True)
class _Arguments:
    """The memory that holds the arguments of this process."""

    address: int
    size: int
    interpreter: bytes
    count: int


def set_title(role: str, run: str = "") -> None:
    """Show the role in this process's command line, and in the short name that top shows.

    If the arguments cannot be overwritten, the process keeps its command line.
    """
    title = f"torchrunx_ray: {role} of {run}" if run else f"torchrunx_ray: {role}"
    if (arguments := _arguments()) is not None:
        with contextlib.suppress(OSError):
            _write(title, arguments)
    short = f"{role.removeprefix('worker ')} {run}".strip()
    _libc.prctl(_PR_SET_NAME, _encoded(short, _NAME_SIZE), 0, 0, 0)


@functools.cache
def _arguments() -> _Arguments | None:
    """Return the location of the arguments, which the kernel reports. Forks inherit the cached answer.

    Return None if the kernel does not report it, or if the memory there does not match the command line.
    """
    try:
        fields = proc.stat("self")
        begin, end = int(fields[45]), int(fields[46])
        with open(memory.open_own(), "r+b", buffering=0) as own:
            found = os.pread(own.fileno(), end - begin, begin)
        if found != Path("/proc/self/cmdline").read_bytes():
            return None
    except (OSError, OverflowError, ValueError, IndexError):
        return None
    *words, _ = found.split(_END)
    return _Arguments(begin, end - begin, words[0], len(words)) if words else None


def _write(title: str, arguments: _Arguments) -> None:
    # A function may use setproctitle. That package searches for the interpreter's path and, after the path, for
    # the original number of arguments.
    interpreter = _END + arguments.interpreter + _END
    others = _END * (arguments.count - 1)
    room = arguments.size - len(interpreter) - len(others)
    if room <= 0:  # started without PADDING; the environment begins after the arguments
        return
    written = _encoded(title, room) + interpreter
    with open(memory.open_own(), "r+b", buffering=0) as own:
        os.pwrite(
            own.fileno(), written.ljust(arguments.size - len(others)) + others, arguments.address
        )


def _encoded(text: str, size: int) -> bytes:
    """Encode the text, truncated to this many bytes without splitting a character."""
    whole = text.replace("\0", " ").encode(errors="replace")
    return whole[:size].decode(errors="ignore").encode()
