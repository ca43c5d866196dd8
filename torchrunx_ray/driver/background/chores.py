"""Tasks and timers that end together with their owner."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Chores:
    """Background tasks and timers of one owner. Used only in the background loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: list[asyncio.TimerHandle] = []

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, call, *args))

    def close(self) -> None:
        """Cancel all tasks and timers."""
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
