"""Files in which workers note when something happened, and what reads them."""

import os
import time
from collections.abc import Sequence
from pathlib import Path


def note(folder: str, name: str, time_s: float) -> None:
    Path(folder, "unfinished " + name).write_text(f"{time_s} {os.getpid()}")
    Path(folder, "unfinished " + name).rename(Path(folder, name))


def until_noted(
    folder: str, kind: str, attempts: Sequence[int], ranks: int, patience_s: float
) -> float:
    """Wait until all ranks of one of these attempts have noted this. Return the time of the last one."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        for attempt in attempts:
            notes = [Path(folder, f"{kind} {attempt} {rank}") for rank in range(ranks)]
            if all(each.exists() for each in notes):
                return max(float(each.read_text().split()[0]) for each in notes)
        time.sleep(0.005)
    raise TimeoutError(f"no attempt has {kind} on all ranks after {patience_s:g} s")


def pid_above(worker: int, name: str) -> int:
    """Return the pid of a worker, or of what stands above it."""
    pid = worker
    above = ("worker", "template", "keeper", "outer keeper", "agent", "raylet")
    for _ in range(above.index(name)):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid
