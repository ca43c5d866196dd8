"""A run as its user holds it."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from torchrunx_ray.driver import loop
from torchrunx_ray.driver.failures import Failures
from torchrunx_ray.driver.progress import Progress
from torchrunx_ray.driver.results import LaunchResult
from torchrunx_ray.driver.stacks import Stacks

R = TypeVar("R")

_living: set["Run[Any]"] = set()
"""Runs go on when nobody holds them, and an event loop keeps no task alive."""


class Run(Generic[R]):
    """A launch in the background; its methods behave as those of concurrent.futures.Future.

    It can be awaited too, from any event loop; cancelling whoever awaits it does not stop it.
    """

    def __init__(
        self, life: Coroutine[Any, Any, "LaunchResult[Any] | Failures"], progress: Progress
    ) -> None:
        self._progress = progress
        self._ended: concurrent.futures.Future[LaunchResult[R] | Failures] = (
            concurrent.futures.Future()
        )
        self._loop = loop.running()
        self._loop.call_soon_threadsafe(self._begin, life)

    def result(self, timeout: float | None = None) -> LaunchResult[R]:
        """Wait for all workers; raise what the first failing one raised.

        After `timeout` seconds TimeoutError is raised, and the run goes on. Ctrl-C stops the run
        and raises KeyboardInterrupt when nothing of it is left; a second one kills it.
        """
        try:
            loop.wait(self._ended, timeout)
        except KeyboardInterrupt as interrupt:
            self._stop()
            if stacks := self._progress.stacks_at_stop:
                interrupt.add_note(f"When it was interrupted:\n{stacks.summary}")
            raise
        if not self._ended.done():
            raise TimeoutError(f"the run goes on after {timeout:g} s; result() waits for it again")
        return self._value_of(self._ended.result())

    def stacks(self) -> Stacks:
        """What the workers are doing now; `print` it.

        None before they are started, nor when they have ended.
        """
        asked = loop.start(self._progress.stacks())
        loop.wait(asked)
        return asked.result()

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
        loop.wait(self._ended)

    def call_when_done(self, call: "Callable[[Run[Any]], object]") -> None:
        """Call it with this run, in some thread, once it has ended."""
        once = [self]  # a future keeps its callbacks, and a run keeps its future
        self._ended.add_done_callback(lambda _: call(once.pop()))

    def __await__(self) -> Generator[Any, None, LaunchResult[R]]:
        ended = asyncio.shield(asyncio.wrap_future(self._ended))
        return self._value_of((yield from ended.__await__()))

    def _stop(self) -> None:
        for _ in range(2):
            self.cancel()
            try:
                self.wait()
            except KeyboardInterrupt:
                continue
            return

    def _begin(self, life: Coroutine[Any, Any, "LaunchResult[Any] | Failures"]) -> None:
        _living.add(self)
        self._task = asyncio.ensure_future(life)
        self._task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[LaunchResult[Any] | Failures]") -> None:
        _living.discard(self)
        if task.cancelled():
            self._ended.cancel()
            self._ended.set_running_or_notify_cancel()
            return
        error = task.exception()
        if error is not None:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(task.result())

    def _value_of(self, outcome: "LaunchResult[R] | Failures") -> LaunchResult[R]:
        if isinstance(outcome, Failures):
            # Made and raised in the user's thread: his exceptions may be of any kind, even such as
            # an event loop understands otherwise, and bring imports along.
            error = outcome.exception
            if self._progress.log_directory is not None:
                error.add_note(f"All output of this launch: {self._progress.log_directory}")
            raise error
        return outcome
