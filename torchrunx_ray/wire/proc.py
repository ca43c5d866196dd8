"""The kernel's table of processes, as /proc shows it."""

import os
from collections.abc import Iterator
from pathlib import Path


def pids() -> Iterator[int]:
    """Yield the pid of every process; some may have ended when they are looked at."""
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def stat(pid: int | str) -> list[str]:
    """Return the fields of a process's stat line from its state on: state, parent, group, ..."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def environment(pid: int) -> list[bytes]:
    """Return the variables that a process was started with, as NAME=value."""
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
