"""The watchdog of a host's workers: ends those that do not leave a scope of torch's `expires` in time."""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from torchrunx_ray.agent.scopes import Scope, Scopes
from torchrunx_ray.agent.timer_file import TimerFile
from torchrunx_ray.agent.worker import Worker
from torchrunx_ray.wire import proc
from torchrunx_ray.wire.environment import TIMER_FILE
from torchrunx_ray.wire.messages import StacksWanted

_STACKS = StacksWanted(within_s=0.15, thread_s=0.1)
"""Limits for the stacks of a worker at its deadline, after which it gets its signal."""


class Watchdog:
    """Reads the timer file. Only processes of the present attempt's workers are heard.

    torch's own watchdog kills its process together with the worker's.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._file = TimerFile(path, folder)
        self._loop = asyncio.get_running_loop()
        self._scopes = Scopes()
        self._workers: Mapping[int, Worker] = {}
        self._waking: asyncio.TimerHandle | None = None
        self._ending = set[asyncio.Task[None]]()
        self._loop.add_reader(self._file.fd, self._look)

    def variables(self) -> dict[str, str]:
        return {TIMER_FILE: str(self._file.path)}

    def watch(self, workers: Mapping[int, Worker]) -> None:
        """Begin with the workers of an attempt, by local rank."""
        self._workers = workers

    def rest(self) -> None:
        """Forget the workers of an attempt."""
        self._workers = {}
        self._scopes.clear()

    def close(self) -> None:
        self._loop.remove_reader(self._file.fd)
        if self._waking is not None:
            self._waking.cancel()
        self._file.close()

    def _look(self) -> None:
        """Read what has arrived, then look for deadlines: a process that has just left its scope is not late."""
        for request in self._file.read():
            self._scopes.take(request, time.time(), self._loop.time())
        for scope in self._scopes.pop_expired(self._loop.time()):
            if worker := self._worker_of(scope.pid):
                self._ending.add(task := asyncio.ensure_future(self._end(worker, scope)))
                task.add_done_callback(self._ending.discard)
        if self._waking is not None:
            self._waking.cancel()
        deadline = self._scopes.next_deadline()
        self._waking = None if deadline is None else self._loop.call_at(deadline, self._look)

    async def _end(self, worker: Worker, scope: Scope) -> None:
        """Take the worker's stacks, report them, and send the signal to the process that is still in the scope."""
        stacks = await worker.stacks(_STACKS)
        if self._worker_of(scope.pid) is worker:
            worker.has_stayed_in(scope, stacks)
            if scope.signal > 0:
                with contextlib.suppress(OSError):  # it has just ended
                    os.kill(scope.pid, scope.signal)

    def _worker_of(self, pid: int) -> Worker | None:
        """Return the running worker that is this process or has started it; None if there is none.

        A process whose parent has ended is known by its group, unless it has left the group as well.
        """
        running = {worker.pid: worker for worker in self._workers.values() if worker.is_running}
        with contextlib.suppress(OSError):  # the process has ended
            for ancestor in proc.ancestors(pid):
                if worker := running.get(ancestor) or running.get(os.getpgid(ancestor)):
                    return worker
        return None
