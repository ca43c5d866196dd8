"""The FIFO to which torch's FileTimerClient writes: a line for each scope that a process enters or leaves."""

import contextlib
import fcntl
import json
import math
import os
import select
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import NSIG
from typing import Any

from torchrunx_ray.wire import fifo
from torchrunx_ray.wire.environment import TIMER_ENABLED, TIMER_FILE
from torchrunx_ray.wire.folder import forget_outside, note_outside

_SIZE = 2**20
"""Bytes that the FIFO holds while the agent is busy. A client whose line finds no room raises an error."""

_CHUNK = 2**16
"""Bytes that are read at a time, so that writers who never pause cannot keep the agent from its other work."""

_LONGEST = select.PIPE_BUF
"""Bytes of the longest line. torch's client refuses longer ones, since Linux would not write them as a whole."""

_STARTS = 4
"""Places in a line at which a request may begin: a scope's name may contain the same characters."""

_PIDS = 2**31
"""More than any pid."""


class TimerFileError(Exception):
    """The FIFO cannot be made or used. The text is for the user."""


class TimerFileInUseError(TimerFileError):
    """Another process reads the FIFO now."""


@dataclass(frozen=True)
class Request:
    """A process enters a scope, or leaves it (`expires_at` is negative)."""

    pid: int
    scope: str
    expires_at: float
    """Time of the wall clock."""
    signal: int


def wanted_path(environment: Mapping[str, str], cwd: str, folder: Path) -> Path | None:
    """Return the path that the workers' environment has, or else a path in the folder; None without a watchdog."""
    if environment.get(TIMER_ENABLED) != "1":
        return None
    fixed = environment.get(TIMER_FILE)
    return Path(cwd, fixed) if fixed else folder / "timer"


class TimerFile:
    """The FIFO, which exists and is locked until `close`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._folder = folder
        self._unread = b""
        is_fixed = path.parent != folder
        with contextlib.suppress(OSError):  # the host has no room for the folder
            if is_fixed:
                note_outside(
                    folder, path
                )  # first, so that an agent that is killed now leaves nothing
        try:
            self.fd = fifo.open_locked(str(path))
        except OSError as error:
            self._forget_outside()
            raise _error(path, is_fixed, error) from None
        with contextlib.suppress(OSError):  # the host limits the size of pipes
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, _SIZE)

    def read(self) -> Iterator[Request]:
        """Yield requests that have arrived, without waiting. More may be left, so that the FIFO stays readable."""
        with contextlib.suppress(BlockingIOError):
            yield from self._read_chunk()

    def read_all(self) -> Iterator[Request]:
        """Yield the requests that have arrived, at most as many as a full FIFO can hold."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_SIZE // _CHUNK):
                yield from self._read_chunk()

    def _read_chunk(self) -> Iterator[Request]:
        """Yield the requests of one chunk. Raises BlockingIOError if nothing has arrived."""
        *lines, rest = (self._unread + os.read(self.fd, _CHUNK)).split(b"\n")
        self._unread = rest[-_LONGEST:]
        for line in lines:
            if (request := _parsed(line[-_LONGEST:])) is not None:
                yield request

    def close(self) -> None:
        fifo.remove_own(str(self.path), self.fd)
        os.close(self.fd)
        self._forget_outside()

    def _forget_outside(self) -> None:
        with contextlib.suppress(OSError):
            forget_outside(self._folder)


def _error(path: Path, is_fixed: bool, error: OSError) -> TimerFileError:
    """Return the error for a FIFO that cannot be opened, with advice."""
    own = f"Without {TIMER_FILE}, each agent makes a FIFO of its own."
    match error:
        case BlockingIOError():
            return TimerFileInUseError(
                f"another agent or program on this node reads the FIFO of the watchdog, {path}. {own}"
            )
        case FileExistsError():
            return TimerFileError(
                f"the path of the watchdog's FIFO, {TIMER_FILE}={path}, leads to something else. Choose a path that does "
                f"not exist yet. {own}"
            )
        case _:
            advice = "Is there room in the folder for temporary files?"
            if is_fixed:
                advice = f"Does its folder exist on this node, and may the user write there? {own}"
            return TimerFileError(
                f"the FIFO of the watchdog, {path}, cannot be made ({error.strerror}). {advice}"
            )


def _parsed(line: bytes) -> Request | None:
    """Return the request at the end of a line; None if there is none.

    The line may begin with a part of another one, whose writer ended too early.
    """
    start = len(line)
    for _ in range(_STARTS):
        start = line.rfind(b'{"', 0, start)
        if start < 0:
            break
        with contextlib.suppress(ValueError, OverflowError, RecursionError):
            return _request(json.loads(line[start:]))
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
