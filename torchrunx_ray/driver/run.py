"""A run as its user holds it."""

import asyncio
import atexit
import concurrent.futures
import logging
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from torchrunx_ray.driver import loop
from torchrunx_ray.driver.failures import Failures
from torchrunx_ray.driver.progress import Progress
from torchrunx_ray.driver.results import LaunchResult
from torchrunx_ray.driver.stacks import Stacks

R = TypeVar("R")

logger = logging.getLogger("torchrunx_ray")

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
        self._was_asked = False
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
            if self._progress.log_directory is not None:
                interrupt.add_note(f"All output of this launch: {self._progress.log_directory}")
            raise
        if not self._ended.done():
            raise TimeoutError(f"the run goes on after {timeout:g} s; result() waits for it again")
        self._was_asked = True
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
        self._was_asked = True
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
            raise outcome.exception
        return outcome

    def __repr__(self) -> str:
        state = "ended" if self._ended.done() else self._progress.phase
        return f"<Run {self._progress.name}: {state}>"

    def __del__(self) -> None:
        """Tell of a failure that nobody has asked for; it would be lost without a word."""
        if self._was_asked or not self._ended.done() or self._ended.cancelled():
            return
        error = self._ended.exception()
        outcome = self._ended.result() if error is None else None
        reason = outcome.in_brief if isinstance(outcome, Failures) else error
        if reason is not None:
            logger.error(
                "%s failed, and nobody asked for its result: %s", self._progress.name, reason
            )


def _tell_of_living() -> None:
    for run in list(_living):
        logger.warning("the script ended while %r; it is stopped. `result()` waits for a run.", run)


# Before Ray's own, which was registered earlier, ends the agents.
atexit.register(_tell_of_living)
