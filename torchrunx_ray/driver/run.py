"""A run as its user holds it."""

import asyncio
import concurrent.futures
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

from torchrunx_ray.driver import loop
from torchrunx_ray.driver.results import LaunchResult
from torchrunx_ray.errors import LaunchError, RemoteFailure

R = TypeVar("R")

_living: set["Run[Any]"] = set()
"""Runs go on when nobody holds them, and an event loop keeps no task alive."""


class Run(Generic[R]):
    """A launch in the background; its methods behave as those of concurrent.futures.Future.

    It can be awaited too, from any event loop.
    """

    def __init__(self, life: Coroutine[Any, Any, LaunchResult[R]]) -> None:
        self._ended: concurrent.futures.Future[LaunchResult[R]] = concurrent.futures.Future()
        self._loop = loop.running()
        self._loop.call_soon_threadsafe(self._begin, life)

    def result(self, timeout: float | None = None) -> LaunchResult[R]:
        """Wait for all workers; raise what the first failing one raised.

        After `timeout` seconds TimeoutError is raised, and the run goes on. Ctrl-C stops the run
        and raises KeyboardInterrupt when nothing of it is left; a second one kills it.
        """
        try:
            concurrent.futures.wait([self._ended], timeout)
        except KeyboardInterrupt:
            self._stop()
            raise
        if not self._ended.done():
            raise TimeoutError(f"the run goes on after {timeout:g} s; result() waits for it again")
        error = self._ended.exception()
        if error is not None:
            raise error  # here, so that a user's traceback shows no more of us than this
        return self._ended.result()

    def done(self) -> bool:
        """Whether it has ended and given its hosts back."""
        return self._ended.done()

    def cancel(self) -> bool:
        """Begin to stop the run; False where it has ended. `result` will raise CancelledError."""
        if self._ended.done():
            return False
        self._loop.call_soon_threadsafe(lambda: self._task.cancel())
        return True

    def wait(self) -> None:
        """Return when the run has ended, in whatever way."""
        concurrent.futures.wait([self._ended])

    def __await__(self) -> Generator[Any, None, LaunchResult[R]]:
        return asyncio.wrap_future(self._ended).__await__()

    def _stop(self) -> None:
        for _ in range(2):
            self.cancel()
            try:
                self.wait()
            except KeyboardInterrupt:
                continue
            return

    def _begin(self, life: Coroutine[Any, Any, LaunchResult[R]]) -> None:
        _living.add(self)
        self._task = asyncio.ensure_future(life)
        self._task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[LaunchResult[R]]") -> None:
        _living.discard(self)
        if task.cancelled():
            self._ended.cancel()
            self._ended.set_running_or_notify_cancel()
            return
        error = task.exception()
        if error is not None:
            told = isinstance(error, LaunchError) or isinstance(error.__cause__, RemoteFailure)
            self._ended.set_exception(error.with_traceback(None) if told else error)
        else:
            self._ended.set_result(task.result())
