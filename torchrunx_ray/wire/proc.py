"""The kernel's table of processes, as /proc shows it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process that cannot be confused with a later one of the same pid."""

    pid: int
    started: str
    """Time of its start, as the kernel counts it."""


def identified(pid: int) -> Process | None:
    """Return the process with this pid; None if it has ended."""
    with contextlib.suppress(OSError):
        state, *fields = stat(pid)
        if state != "Z":
            return Process(pid, fields[18])
    return None


def is_alive(process: Process) -> bool:
    return identified(process.pid) == process


def pids() -> Iterator[int]:
    """Return an iterator over the pids of all processes; some may have ended when they are used."""
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def stat(pid: int | str) -> list[str]:
    """Return the fields of a process's stat line, beginning with the state: state, parent, group, ..."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def children(pid: int) -> list[int]:
    """Return the children of a process's main thread. None if it has ended, or without CONFIG_PROC_CHILDREN."""
    with contextlib.suppress(OSError):
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in listed.split()]
    return []


def ancestors(pid: int) -> Iterator[int]:
    """Return an iterator over a process, its parent, and so on. It raises OSError at a process that has ended."""
    while pid > 0:
        yield pid
        pid = int(stat(pid)[1])


def environment(pid: int) -> list[bytes]:
    """Return a process's initial environment variables, as NAME=value."""
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
