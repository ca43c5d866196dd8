"""What all processes that a test can see are doing, for the report of a test that hangs."""

from collections import Counter
from pathlib import Path

from tests import processes
from tests.traces import pids


def seen() -> str:
    """Return a line for each process: its state, and in which calls of the kernel its threads are."""
    return "\n".join(line for pid in pids() if (line := _in_words(pid)))


def _in_words(pid: int) -> str:
    try:
        words = processes.command_line(pid).strip()
        calls = Counter(_call(task) for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return ""
    return f"{pid} {words[:80]}: {dict(calls)}" if words else ""


def _call(task: Path) -> str:
    """Return the state of a thread, the number of the system call that it is in, and the first argument."""
    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    try:
        call = (task / "syscall").read_text().split()[:2]
    except OSError:
        call = []
    return " ".join([state, *call])
