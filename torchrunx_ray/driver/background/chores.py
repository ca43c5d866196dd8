"""Tasks and timers that end together with their owner."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Chores:
    """Background tasks and timers of one owner. Used only in the background loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._is_closed = False

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        if self._is_closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        if not self._is_closed:
            self._timers.append(asyncio.get_running_loop().call_later(delay_s, call, *args))

    def close(self) -> None:
        """Cancel all tasks and timers. Later ones are not begun."""
        self._is_closed = True
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
