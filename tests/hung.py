"""A look at all processes that a test can see, for the report of a test that hangs."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests import processes
from tests.processes import pids


def seen() -> str:
    """Return in which calls of the kernel each process's threads are, and the stacks of Python's."""
    return "\n".join(line for pid in pids() if (line := _in_words(pid)))


def _in_words(pid: int) -> str:
    try:
        words = processes.command_line(pid).strip()
        is_python = os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
        calls = Counter(_call(task) for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return ""
    if not words:
        return ""
    return f"{pid} {words[:80]}: {dict(calls)}\n{_stacks(pid) if is_python else ''}"


def _call(task: Path) -> str:
    """Return a thread's state, and the number of its system call with the first argument."""
    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    try:
        call = (task / "syscall").read_text().split()[:2]
    except OSError:
        call = []
    return " ".join([state, *call])


def _stacks(pid: int) -> str:
    """By py-spy, which needs no help of the process."""
    command = [Path(sys.executable).parent / "py-spy", "dump", "--nonblocking", "--pid", str(pid)]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{error}\n"
