"""The watchdog of a host's workers: ends those that do not leave a scope of torch's `expires` in time."""

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from torchrunx_ray.agent.condition import Condition
from torchrunx_ray.agent.scopes import Scope, Scopes
from torchrunx_ray.agent.timer_file import Request, TimerFile
from torchrunx_ray.agent.worker import Worker
from torchrunx_ray.wire import proc
from torchrunx_ray.wire.environment import TIMER_FILE
from torchrunx_ray.wire.messages import StacksWanted
from torchrunx_ray.wire.proc import Process

logger = logging.getLogger("torchrunx_ray")

_STACKS = StacksWanted(within_s=0.18, thread_s=0.1)
"""Limits for the stacks of a worker at its deadline."""

_STACKS_S = 0.2
"""Time from the deadline to the signal, also if somebody else asks for the worker's stacks meanwhile."""

_PASS_S = 1.0
"""Longest time between two looks at the deadlines, by which the health checks see that the watchdog runs."""

_PAUSE_S = 0.02
"""Shortest time between two looks, so that a flood of scopes cannot keep the agent from its other work."""


class Watchdog:
    """Reads the timer file, and hears only processes of the present attempt's workers."""

    def __init__(self, path: Path, folder: Path, condition: Condition) -> None:
        self._file = TimerFile(path, folder)
        self.place = path, folder
        self._condition = condition
        self._loop = asyncio.get_running_loop()
        self._scopes = Scopes()
        self._workers: Mapping[int, Worker] = {}
        self._waking: asyncio.TimerHandle | None = None
        self._ending = set[asyncio.Task[None]]()
        self._looked_at = -math.inf
        self._loop.add_reader(self._file.fd, self._hear)
        self._look()

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
        self._condition.watchdog_at = None

    def _hear(self) -> None:
        self._take(self._file.read())
        self._wake_in_time()

    def _look(self) -> None:
        """Look for deadlines, after all that has arrived: a process that has just left its scope is not late."""
        self._take(self._file.read_all())
        for scope in self._scopes.pop_expired(self._loop.time()):
            if worker := self._worker_of(scope.process):
                self._ending.add(task := asyncio.ensure_future(self._end(worker, scope)))
                task.add_done_callback(self._ending.discard)
        self._scopes.forget_unless(proc.is_alive)
        self._condition.watchdog_at = time.monotonic()
        self._looked_at = self._loop.time()
        self._wake_in_time()

    def _take(self, requests: Iterable[Request]) -> None:
        known: dict[int, Process | None] = {}
        for request in requests:
            if request.expires_at < 0:
                self._scopes.leave(request)
                continue
            if request.pid not in known:
                known[request.pid] = proc.identified(request.pid)
            if (process := known[request.pid]) is not None:
                seconds = request.expires_at - time.time()
                self._scopes.enter(process, request, seconds, self._loop.time())

    def _wake_in_time(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
        at_least = self._loop.time() + _PASS_S
        deadline = self._scopes.next_deadline()
        wakes_at = at_least if deadline is None else min(deadline, at_least)
        wakes_at = max(wakes_at, self._looked_at + _PAUSE_S)
        self._waking = self._loop.call_at(wakes_at, self._look)

    async def _end(self, worker: Worker, scope: Scope) -> None:
        """Take the worker's stacks, report them, and send the signal to the process, if it still lives."""
        stacks = ""
        try:
            async with asyncio.timeout(_STACKS_S):
                stacks = await worker.stacks(_STACKS)
        except Exception as error:  # the worker is ended also without its stacks
            logger.debug("no stacks of a worker at its deadline: %r", error)
        if self._worker_of(scope.process) is worker:
            worker.has_stayed_in(scope, stacks)
            if scope.signal > 0:
                with contextlib.suppress(OSError):  # it has just ended
                    os.kill(scope.process.pid, scope.signal)

    def _worker_of(self, process: Process) -> Worker | None:
        """Return the running worker that is this process or has started it; None if there is none.

        A process whose parent has ended is known by its group, unless it has left the group as well.
        """
        if not proc.is_alive(process):
            return None
        running = {worker.pid: worker for worker in self._workers.values() if worker.is_running}
        with contextlib.suppress(OSError):  # the process has just ended
            for ancestor in proc.ancestors(process.pid):
                if worker := running.get(ancestor) or running.get(os.getpgid(ancestor)):
                    return worker
        return None
