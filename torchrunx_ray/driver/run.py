"""A run as its user holds it."""

import asyncio
import atexit
import concurrent.futures
import logging
import os
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from torchrunx_ray.driver import loop
from torchrunx_ray.driver.failures import Failures
from torchrunx_ray.driver.progress import Progress
from torchrunx_ray.driver.results import LaunchResult
from torchrunx_ray.driver.stacks import Stacks

R = TypeVar("R")

logger = logging.getLogger("torchrunx_ray")

_living: dict["Run[Any]", Callable[[], None]] = {}
"""Runs go on when nobody holds them, and an event loop keeps no task alive; with what a fork asks of them."""


class Run(Generic[R]):
    """A launch in the background.

    `result` and `done` behave as those of concurrent.futures.Future; `cancel` also stops a run that has
    begun. It can be awaited too, from any event loop; cancelling whoever awaits it stops it, as with
    asyncio's own tasks.
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
        _living[self] = self._leave_to_parent
        self._loop.call_soon_threadsafe(self._begin, life)

    def result(self, timeout: float | None = None) -> LaunchResult[R]:
        """Wait for all workers; raise what the first failing one raised.

        After `timeout` seconds TimeoutError is raised, and the run goes on. Ctrl-C stops the run
        and raises KeyboardInterrupt when nothing of it is left; a second one kills it. So does
        whatever else a signal handler raises: Ray's makes SystemExit of SIGTERM.
        """
        try:
            loop.wait(self._ended, timeout)
        except BaseException as interruption:
            self._was_asked = True
            self._stop()
            self._tell_of_stop(interruption)
            raise
        if not self._ended.done():
            raise TimeoutError(f"the run goes on after {timeout:g} s; result() waits for it again")
        self._was_asked = True
        try:
            return self._value_of(self._ended.result())
        finally:
            del self  # what is raised refers to this frame, and must not wait for Python's gc

    def stacks(self) -> Stacks:
        """What the workers are doing now; `print` it.

        Empty before they are started, and when they have ended.
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
        yield from self._until_ended().__await__()
        return self._value_of(self._ended.result())

    async def _until_ended(self) -> None:
        ended = asyncio.wrap_future(self._ended)
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            while not self._ended.done():
                self.cancel()
                try:
                    await asyncio.shield(asyncio.wait({ended}))
                except asyncio.CancelledError:
                    continue  # a second one kills it
            raise

    def _stop(self) -> None:
        for _ in range(2):
            self.cancel()
            try:
                self.wait()
            except BaseException:
                continue  # a second one kills it
            return

    def _tell_of_stop(self, interruption: BaseException) -> None:
        if (failures := self._progress.failures_before_stop) is not None:
            interruption.add_note(f"Before that it had failed: {failures.in_brief}")
        if stacks := self._progress.stacks_at_stop:
            interruption.add_note(f"When it was interrupted:\n{stacks.summary}")
        if self._progress.log_directory is not None:
            interruption.add_note(f"All output of this launch: {self._progress.log_directory}")
        if isinstance(interruption, SystemExit):  # which Python ends with, without a word
            logger.warning(
                "%s was stopped: the driver is to end (SystemExit: %s, as Ray makes of SIGTERM).\n%s",
                self._progress.name,
                interruption,
                "\n".join(getattr(interruption, "__notes__", ())),
            )

    def _begin(self, life: Coroutine[Any, Any, "LaunchResult[Any] | Failures"]) -> None:
        self._task = asyncio.ensure_future(life)
        self._task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[LaunchResult[Any] | Failures]") -> None:
        _living.pop(self, None)
        if task.cancelled():
            self._ended.cancel()
            self._ended.set_running_or_notify_cancel()
            return
        error = task.exception()
        if error is not None:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(task.result())

    def _leave_to_parent(self) -> None:
        self._was_asked = True
        self._ended = concurrent.futures.Future()
        self._ended.set_exception(
            RuntimeError(
                f"{self._progress.name} belongs to the process that this one was forked from"
            )
        )

    def _value_of(self, outcome: "LaunchResult[R] | Failures") -> LaunchResult[R]:
        if isinstance(outcome, Failures):
            # Made and raised in the user's thread: his exceptions may be of any kind, even such as
            # an event loop understands otherwise, and bring imports along.
            raise outcome.exception
        return outcome

    def __repr__(self) -> str:
        return f"<Run {self._progress.name}: {self._state()}>"

    def _state(self) -> str:
        if not self._ended.done():
            return self._progress.phase
        if self._ended.cancelled():
            return "cancelled"
        has_failed = self._ended.exception() or isinstance(self._ended.result(), Failures)
        return "failed" if has_failed else "ended"

    def __del__(self) -> None:
        """Tell of a failure that nobody has asked for; it would be lost without a word."""
        if self._was_asked or not self._ended.done() or self._ended.cancelled():
            return
        error = self._ended.exception()
        outcome = self._ended.result() if error is None else None
        reason = outcome.in_brief_with_logs if isinstance(outcome, Failures) else error
        if reason is not None:
            logger.error(
                "%s failed, and nobody asked for its result: %s", self._progress.name, reason
            )


def _stop_living() -> None:
    living = list(_living)
    for run in living:
        logger.warning(
            "the script ended while %r; it is being stopped, for shutdown_timeout and some seconds at most. "
            "`result()` waits for a run.",
            run,
        )
        run.cancel()
    for run in living:
        try:
            run.wait()
        except BaseException:
            return  # told to end once more: what is left ends with the driver


def _leave_to_parent() -> None:
    """A forked child has the runs, but not the thread that they live in."""
    for leave in _living.values():
        leave()
    _living.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
# Before Ray's own, which was registered earlier, ends the agents.
atexit.register(_stop_living)
