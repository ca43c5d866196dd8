"""The FIFO to which torch's FileTimerClient writes: a line for each scope that a process enters or leaves."""

import contextlib
import fcntl
import json
import math
import os
import select
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import NSIG
from typing import Any

from torchrunx_ray.wire.environment import TIMER_ENABLED, TIMER_FILE
from torchrunx_ray.wire.folder import name_outside

_SIZE = 2**20
"""Bytes that the FIFO holds while the agent is busy. A client whose line finds no room raises an error."""

_LONGEST = select.PIPE_BUF
"""Bytes of the longest line. torch's client refuses longer ones, since Linux would not write them as a whole."""


_PIDS = 2**31


class TimerFileError(Exception):
    """The FIFO cannot be made or used. The text is for the user."""


@dataclass(frozen=True)
class Request:
    """A process enters a scope, or leaves it (`expires_at` is negative)."""

    pid: int
    scope: str
    expires_at: float
    """Time of the wall clock."""
    signal: int


def wanted_path(environment: Mapping[str, str], cwd: str, folder: Path) -> Path | None:
    """Return the path of the FIFO if the workers' environment asks for a watchdog."""
    if environment.get(TIMER_ENABLED) != "1":
        return None
    fixed = environment.get(TIMER_FILE)
    return Path(cwd, fixed) if fixed else folder / "timer"


class TimerFile:
    """The FIFO, which exists and is locked until `close`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._unread = b""
        self._name_outside = contextlib.ExitStack()
        self.fd = _open(path)
        if path.parent != folder:
            self._name_outside.enter_context(name_outside(folder, path))
        with contextlib.suppress(OSError):  # the host limits the size of pipes
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, _SIZE)

    def read(self) -> Iterator[Request]:
        """Return the requests that have arrived, without waiting."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, _SIZE):
                *lines, rest = (self._unread + data).split(b"\n")
                self._unread = rest[-_LONGEST:]
                for line in lines:
                    if (request := _parsed(line[-_LONGEST:])) is not None:
                        yield request

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._name_outside.close()
        os.close(self.fd)


def _open(path: Path) -> int:
    """Make the FIFO, or take one over that nobody uses. Its lock ends with the process that holds it."""
    while True:
        fd = _open_once(path)
        with contextlib.suppress(FileNotFoundError):  # its last user has just removed it
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)


def _open_once(path: Path) -> int:
    try:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        if not stat.S_ISFIFO(os.stat(path).st_mode):
            raise TimerFileError(
                f"{TIMER_FILE}={path} is no FIFO. The watchdog makes its own: give it a path that does not exist yet, or "
                "none, and remove the file if nobody needs it."
            )
        # Also open for writing: otherwise the FIFO would be at its end whenever no client has it open.
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        raise TimerFileError(
            f"the FIFO of the watchdog, {TIMER_FILE}={path}, cannot be opened: {error.strerror}: does its folder exist, "
            "and may this user write to it? Without this variable, the watchdog uses a folder of its own."
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise TimerFileError(
            f"the FIFO of the watchdog, {TIMER_FILE}={path}, is in use by another launch on this node. Give each launch a "
            "path of its own, or none: without this variable, the watchdog makes its own."
        ) from None
    return fd


def _parsed(line: bytes) -> Request | None:
    """Return the request at the end of a line; None if there is none.

    The line may begin with a part of another one, whose writer ended too early.
    """
    start = line.find(b"{")
    while start >= 0:
        with contextlib.suppress(ValueError, RecursionError):
            return _request(json.loads(line[start:]))
        start = line.find(b"{", start + 1)
    return None


def _request(data: Any) -> Request:
    match data:
        case {
            "pid": int(pid),
            "scope_id": str(scope),
            "expiration_time": int() | float() as expires_at,
            "signal": int(signal),
        } if 0 < pid < _PIDS and signal < NSIG and math.isfinite(expires_at):
            return Request(pid, scope, float(expires_at), signal)
        case _:
            raise ValueError("no request of torch's FileTimerClient")
