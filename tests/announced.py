"""Functions of launches that say where they run, and what they have said."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torchrunx_ray as trx
from tests.processes import above, note


@dataclass(frozen=True)
class Seen:
    """What a rank saw of its attempt."""

    attempt: int
    restarts: int
    rank: int
    world_size: int
    raylet: int
    """Pid of the node's raylet, by which tests tell nodes apart."""


def announce_and_wait(folder: Path) -> Seen:
    """Note this rank of this attempt, and wait until somebody says that it may return."""
    context = trx.context()
    seen = Seen(
        context.attempt, context.restarts, context.rank, context.world_size, raylet_of(os.getpid())
    )
    note(folder / f"{context.attempt}.{context.rank}", f"{seen.raylet} {os.getpid()}")
    while not (folder / f"return {context.attempt}").exists():
        time.sleep(0.01)
    return seen


def run_until_asked(folder: Path) -> tuple[int, int, str | None]:
    """Note this rank of this attempt, and return when asked to stop, or when somebody says so."""
    context = trx.context()
    note(folder / f"{context.attempt}.{context.rank}", f"{raylet_of(os.getpid())} {os.getpid()}")
    asked = None
    while not (folder / f"return {context.attempt}").exists():
        if (asked := context.stop_asked) is not None:
            note(
                folder / f"asked {context.attempt}",
                f"{asked.reason} {asked.deadline} {time.time()}",
            )
            break
        time.sleep(0.01)
    return context.attempt, context.world_size, None if asked is None else asked.reason


def raylet_of(worker: int) -> int:
    variables = Path(f"/proc/{above(worker)['agent']}/environ").read_bytes().split(b"\0")
    (pid,) = (each[15:] for each in variables if each.startswith(b"RAY_RAYLET_PID="))
    return int(pid)


def started(folder: Path, attempt: int) -> dict[int, tuple[int, int]]:
    """Pids of the raylet and the worker of each rank of an attempt that has begun its function."""
    found: dict[int, tuple[int, int]] = {}
    for path in folder.glob(f"{attempt}.*"):
        raylet, pid = path.read_text().split()
        found[int(path.name.partition(".")[2])] = int(raylet), int(pid)
    return found


def raylets_by_rank(folder: Path, attempt: int) -> list[int]:
    return [raylet for _, (raylet, _) in sorted(started(folder, attempt).items())]
