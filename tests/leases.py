"""What tests see of the leases of workers, and workers that show when they lived."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import above, command_line, note, pids, wait_until
from torchrunx_ray.wire.clock import boot_ns
from torchrunx_ray.wire.lease import LeasePage


def page_of(worker: int) -> LeasePage:
    """The page that the keepers above a worker hold."""
    folder = Path(f"/proc/{above(worker)['outer keeper']}/fd")
    for entry in folder.iterdir():
        if "torchrunx_ray_lease" in os.readlink(entry):
            fd = os.open(entry, os.O_RDWR)
            try:
                return LeasePage(fd)
            finally:
                os.close(fd)
    raise FileNotFoundError(folder)


def until_renewed(worker: int, lease_s: float) -> None:
    """Wait until the pulse knows that the host has a lease from it: the host has told so in its second request."""
    page = page_of(worker)
    seen: set[int] = set()

    def is_renewed() -> bool:
        expires_at_ns = page.expires_at_ns
        if 0 < expires_at_ns <= boot_ns() + lease_s * 1e9:
            seen.add(expires_at_ns)
        return len(seen) == 3

    assert wait_until(is_renewed, 30)


def pulse_pids() -> list[int]:
    """The pulses of all drivers in this lane."""
    found: list[int] = []
    for pid in pids():
        try:
            if command_line(pid).startswith("ray::Pulse"):
                found.append(pid)
        except OSError:
            continue
    return found


def beat(folder: Path, last_attempt: int = 1) -> Callable[[], int]:
    """A function that writes the time and its attempt every 10 ms. Returns in the last attempt, after a while."""

    def beat() -> int:
        import torchrunx_ray as trx

        rank, attempt = os.environ["RANK"], trx.context().attempt
        note(folder / f"pid {attempt} {rank}", os.getpid())
        file = os.open(folder / f"beats {rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for _ in range(20 if attempt == last_attempt else 10_000):
            os.write(file, f"{boot_ns()} {attempt}\n".encode())
            time.sleep(0.01)
        return attempt

    return beat


def beating(folder: Path, rank: int = 0, attempt: int = 0) -> int:
    """Wait until this worker beats, and return its pid."""
    path = folder / f"pid {attempt} {rank}"
    assert wait_until(path.exists, 60)
    return int(path.read_text())


def gap_s(folder: Path, rank: int = 0) -> float:
    """The time between the last sign of the first attempt and the first sign of the next one."""
    return (min(_beats(folder, rank, attempt=1)) - last_beat_ns(folder, rank)) / 1e9


def outlived_s(folder: Path, page: LeasePage, rank: int = 0) -> float:
    """The time by which a worker of the first attempt outlived its lease; the driver allows for a second."""
    return (last_beat_ns(folder, rank) - page.expires_at_ns) / 1e9


def last_beat_ns(folder: Path, rank: int) -> int:
    """The time of the last sign of the first attempt."""
    return max(_beats(folder, rank, attempt=0))


def _beats(folder: Path, rank: int, attempt: int) -> list[int]:
    text = (folder / f"beats {rank}").read_text()
    beats = [tuple(map(int, line.split())) for line in text.splitlines()]
    return [at for at, of_attempt in beats if of_attempt == attempt]
