"""Workers that stay blocked in the kernel, where no signal reaches them."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from torchrunx_ray.agent.scopes import Scope
from torchrunx_ray.agent.worker import Worker
from torchrunx_ray.wire import proc
from torchrunx_ray.wire.messages import BLOCKED

_LOOKS = 4
"""Number of looks at a worker before it counts as blocked."""

_INTERVAL_S = 1.0
"""Longest time between two looks."""


class BlockedWatch:
    """Takes uninterruptible sleep for a scope that the worker must leave in time."""

    def __init__(self, after_s: float, workers: Mapping[int, Worker]) -> None:
        self._after_s = after_s
        self._workers = workers
        self._since: dict[int, float] = {}
        """Time of the first look at which a worker was blocked, by local rank."""
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.call_soon(self._look)

    def close(self) -> None:
        self._next.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        for rank, worker in self._workers.items():
            process = _blocked(worker.pid) if worker.pid and worker.is_running else None
            if process is None:
                self._since.pop(rank, None)
            elif now - self._since.setdefault(rank, now) >= self._after_s:
                name = f"{BLOCKED}{_where(process.pid)}"
                worker.has_stayed_in(Scope(process, name, self._after_s, now, signal.SIGKILL), "")
                with contextlib.suppress(OSError):
                    os.kill(
                        process.pid, signal.SIGKILL
                    )  # for the moment in which the kernel lets it go
        self._next = self._loop.call_later(min(self._after_s / _LOOKS, _INTERVAL_S), self._look)


def _blocked(pid: int) -> proc.Process | None:
    """Return the process if its main thread is in uninterruptible sleep."""
    with contextlib.suppress(OSError):
        if proc.stat(pid)[0] == "D":
            return proc.identified(pid)
    return None


def _where(pid: int) -> str:
    """Return the function of the kernel in which the process sleeps, as far as the kernel tells."""
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{pid}/wchan").read_text()
        if name not in ("", "0"):
            return f" in {name}"
    return ""
