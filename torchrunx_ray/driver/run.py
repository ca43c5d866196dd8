"""The user's handle of a run."""

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import math
import numbers
import types
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from torchrunx_ray.driver import interruption
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.driver.call.references import stays_in_driver
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.report.workers import WorkerInfo
from torchrunx_ray.driver.tracebacks import short_traceback, shorten
from torchrunx_ray.errors import LaunchError

R = TypeVar("R")

Life = Coroutine[Any, Any, LaunchResult[Any] | Failures]

logger = logging.getLogger("torchrunx_ray")

_living: dict["Run[Any]", Callable[[], None]] = {}
"""Runs that have not ended, each with the function that a forked child calls for it.

The references keep a run alive when the user holds none; an event loop keeps no task alive.
"""

_called_at_exit: list[Callable[[], None]] | None = None
"""Callbacks to call after the script has ended, when Python 3.12 starts no thread; None before that."""


class Run(concurrent.futures.Future[LaunchResult[R]]):
    """A launch in the background: a `concurrent.futures.Future` of its result.

    `concurrent.futures.wait` and `as_completed` accept a run. `done()` is True when the run has ended and
    given its hosts back. `cancelled()` is True when `cancel` or `kill` ended the run.
    `add_done_callback(fn)` calls `fn(run)` at the end, in a separate thread. Unlike other futures, a run
    can be cancelled until it ends.

    A run can be awaited from any event loop. Cancelling the task that awaits a run cancels the run,
    as with asyncio's own tasks.
    """

    _was_asked = True  # until __init__ has finished

    def __init__(self, life: Life, progress: Progress, shutdown_timeout: float) -> None:
        super().__init__()
        self._progress = progress
        self._shutdown_timeout = shutdown_timeout
        self._asked_to: Literal["go on", "stop", "die"] = "go on"
        self._failures: Failures | None = None
        self._raised_at: types.TracebackType | None = None
        self._loop = loop.running()
        self._task: asyncio.Task[LaunchResult[Any] | Failures] | None = None
        self._was_asked = False
        try:
            _living[self] = self._leave_to_parent
            self._loop.call_soon_threadsafe(self._begin, life)
        except BaseException:  # Ctrl-C, before the call was queued or after
            self._loop.call_soon_threadsafe(self._abandon, life)
            raise

    @property
    def name(self) -> str:
        """Name of the run in logs and errors."""
        return self._progress.name

    @property
    def log_directory(self) -> Path | None:
        """Directory of the default log files; None if there are none, or nothing is written to them yet."""
        return self._progress.log_directory

    def result(self, timeout: float | None = None) -> LaunchResult[R]:
        """Wait for all workers. Raises the exception of the first failing worker.

        After `timeout` seconds TimeoutError is raised, and the run goes on. Ctrl-C cancels the run, and
        raises KeyboardInterrupt when nothing of the run is left. A second Ctrl-C kills the run. Other
        exceptions of signal handlers do the same, such as the SystemExit that Ray makes of SIGTERM.
        """
        with short_traceback:
            try:
                self._wait_for_end(timeout)
                return self._outcome(concurrent.futures.CancelledError)
            finally:
                del self  # an exception refers to this frame, and must not wait for Python's gc

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result`. Return the exception that `result` would raise, or None if it would return."""
        with short_traceback:
            self._wait_for_end(timeout)
            if self.cancelled():
                raise concurrent.futures.CancelledError(f"{self.name} was cancelled")
            return self._error()

    def stacks(self) -> Stacks:
        """Return the current stacks of the workers; `print` shows them.

        Empty before the workers start and after they have ended.
        """
        asked = loop.start(self._progress.stacks())
        loop.wait(asked)
        return asked.result()

    @property
    def spares(self) -> tuple[str, ...]:
        """Names of the hosts that are warm and have no workers, at this moment."""
        return self._progress.spares

    @property
    def attempts(self) -> tuple[AttemptRecord, ...]:
        """All attempts so far, also after a failure or a cancellation.

        While an attempt goes on, its `ended` and `why` are None.
        """
        return self._progress.history.attempts

    def workers(self) -> list[WorkerInfo]:
        """Return the workers of the current attempt by rank; after the end, those of the last attempt.

        Empty before the run has its hosts. The driver answers with what it has heard last from the hosts.
        """
        workers = self._progress.workers
        return [] if workers is None else workers.infos()

    def done(self) -> bool:
        """Return True when the run has ended and given its hosts back."""
        return loop.is_done(self)

    def running(self) -> bool:
        """Return True from the time when the run has its hosts until the run ends."""
        return self._progress.timeline.placed_ns is not None and not self.done()

    def cancel(self) -> bool:
        """Begin to stop the run. Returns False if the run has ended.

        Workers get SIGTERM, and SIGKILL after `shutdown_timeout`. Calling `cancel` again changes
        nothing. `result` raises CancelledError when the run has stopped.
        """
        return self._is_asked_to(self._stop)

    def kill(self) -> bool:
        """Stop the run at once, without `shutdown_timeout`. Returns False if the run has ended.

        Workers get SIGKILL, even if a `cancel` has given them time to save their work.
        """
        return self._is_asked_to(self._die)

    def wait(self) -> None:
        """Wait until the run has ended, whatever its outcome."""
        loop.wait(self)

    def __await__(self) -> Generator[Any, None, LaunchResult[R]]:
        with short_traceback:
            try:
                self._was_asked = True
                yield from self.until_ended().__await__()
                return self._outcome(asyncio.CancelledError)
            finally:
                del self

    async def until_ended(self, *, was_cancelled: bool = False) -> None:
        """Await the end of the run, whatever its outcome.

        A cancellation stops the run, and is raised after the run has ended.
        """
        ended = loop.waker(self)
        cancelled: asyncio.CancelledError | None = None
        while not ended.done():
            is_again = was_cancelled or cancelled is not None
            try:
                await asyncio.shield(ended)
                break
            except asyncio.CancelledError as error:
                cancelled = error
            if is_again and interruption.is_second_ctrl_c_of_asyncio():
                self.kill()
            else:
                self.cancel()
        try:
            if cancelled is not None:
                raise cancelled
        finally:
            del cancelled  # it refers to this frame

    def _wait_for_end(self, timeout: float | None) -> None:
        seconds = _checked(timeout)
        try:
            loop.wait(self, seconds)
        except BaseException as error:
            if interruption.is_interruption(error):
                self._was_asked = True
                self._stop_and_wait(error)
                interruption.tell_of_stop(error, self._progress)
            raise
        if not self.done():
            raise TimeoutError(
                f"the run continues after {seconds:g} s; call result() to wait for it again"
            )
        self._was_asked = True

    def _stop_and_wait(self, first: BaseException) -> None:
        told_of: BaseException | None = first
        for stop in (self.cancel, self.kill):
            try:
                stop()
                interruption.wait_after(told_of, self, self.name, self._shutdown_timeout)
                return
            except BaseException:
                told_of = None

    def _outcome(self, cancelled: type[BaseException]) -> LaunchResult[R]:
        if self.cancelled():
            raise cancelled(f"{self.name} was cancelled")
        error = self._error()
        try:
            if error is None:
                return super().result(0)
            raise BaseException.with_traceback(error, self._raised_at)
        finally:
            del error, self  # an exception refers to this frame

    def _failures_without_exceptions(self) -> Failures | None:
        self._was_asked = True
        if self.cancelled():
            return self._progress.failures_before_stop
        if self._failures is None and (error := super().exception(0)) is not None:
            raise error
        return self._failures

    def _error(self) -> BaseException | None:
        # Unpickled in the caller's thread: this may import user modules, or yield
        # CancelledError, which asyncio treats specially.
        return super().exception(0) if self._failures is None else self._failures.exception

    def _is_asked_to(self, end: Callable[[], None]) -> bool:
        if self.done():
            return False
        self._loop.call_soon_threadsafe(end)
        return True

    def _stop(self) -> None:
        if self._asked_to == "go on":
            self._asked_to = "stop"
            self._cancel_task()

    def _die(self) -> None:
        if self._asked_to == "die":
            return
        self._asked_to = "die"
        self._cancel_task()  # first, so that the run is cancelled even if the kill fails
        if self._progress.supervisor is not None:
            self._progress.supervisor.kill()

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _abandon(self, life: Life) -> None:
        """Stop a run that no caller will ever hold, even if the run has not begun."""
        self._was_asked = True
        if self._task is not None:
            self._stop()
        else:
            life.close()
            _living.pop(self, None)

    def _begin(self, life: Life) -> None:
        self._task = asyncio.ensure_future(life)
        self._task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[LaunchResult[Any] | Failures]") -> None:
        try:
            self._settle(task)
        except BaseException as error:  # without an outcome the waiters would block for ever
            if self.done():
                raise
            self.set_exception(error)
        finally:
            _living.pop(self, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("%s ended with this error", self.name, exc_info=error)

    def _settle(self, task: "asyncio.Task[LaunchResult[Any] | Failures]") -> None:
        if task.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif (error := task.exception()) is not None:
            shorten(error)
            self._raised_at = error.__traceback__
            self.set_exception(error)
        elif isinstance(outcome := task.result(), Failures):
            self._failures = outcome
            # A placeholder: `_error` makes the real exception.
            self.set_exception(LaunchError(outcome.in_brief))
        else:
            self.set_result(outcome)

    def _invoke_callbacks(self) -> None:
        """Wake the waiters, and call the user's callbacks in a separate thread.

        The user's callbacks may block, or start a launch.
        """
        this: Any = self  # the stubs have no private names
        callbacks: list[Callable[[Any], object]] = this._done_callbacks
        for end in [each for each in callbacks if isinstance(each, loop.End)]:
            callbacks.remove(end)
            end(self)
        if not this._done_callbacks:  # a forked child, for example, should start no thread
            return
        future: Any = super()
        call = future._invoke_callbacks
        if loop.start_thread(call):
            return
        if _called_at_exit is None:
            call()
        else:
            _called_at_exit.append(call)

    def _leave_to_parent(self) -> None:
        super().__init__()
        self._was_asked = True
        self.set_exception(
            RuntimeError(f"{self.name} belongs to the process from which this process was forked")
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self.name} cannot be copied or pickled: a run belongs to the process that started it. "
            "Pass its values instead: `result().ref(rank)` is the reference to one value."
        )

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self._phase()}>"

    def _phase(self) -> str:
        if not self.done():
            return self._progress.phase
        if self.cancelled():
            return "cancelled"
        return "ended" if super().exception(0) is None else "failed"

    def __del__(self) -> None:
        """Log a failure if nobody has asked for the run's result."""
        if self._was_asked or not self.done() or self.cancelled():
            return
        error = super().exception(0)
        reason = error if self._failures is None else self._failures.in_brief_with_logs
        if reason is not None:
            logger.error("%s failed, and nobody asked for its result: %s", self.name, reason)


def _checked(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if not isinstance(timeout, numbers.Real):
        raise TypeError(f"timeout={timeout!r}: expected a number of seconds, or None")
    if math.isnan(timeout):
        raise ValueError("timeout=nan: expected a number of seconds, or None")
    return float(timeout)


def _stop_living() -> None:
    global _called_at_exit
    _called_at_exit = []
    living = {run: repr(run) for run in list(_living)}
    for run in living:
        run.cancel()
    try:
        for shown in living.values():  # after the cancellations, since a log handler may block
            with contextlib.suppress(Exception, SystemExit):  # raised by a log handler of the user
                logger.warning(
                    "the script ended while %s; the run is being stopped, for shutdown_timeout and some seconds at "
                    "most. To wait for a run, call its `result()`.",
                    shown,
                )
        for run in living:
            run.wait()
        if living:  # a run is done a moment before its callbacks are in _called_at_exit
            loop.wait(loop.start(asyncio.sleep(0)))
        while _called_at_exit:
            with contextlib.suppress(SystemExit):
                _called_at_exit.pop(0)()
    except BaseException:
        return  # interrupted again: remaining runs end with the driver


def failures_of(run: Run[Any]) -> Failures | None:
    """Wait for a run. Return its failures, for a caller who loads no exception of the function; None if it has none.

    If the run was stopped, these are the failures from before the stop. Raises the error of a run that had no workers.
    """
    run.wait()
    return run._failures_without_exceptions()  # pyright: ignore[reportPrivateUsage]


stays_in_driver(
    Run,
    "it is a Run, which belongs to the process that started it; pass run.result().ref(i), the "
    "reference to one rank's value, or a value itself.",
)


def _leave_to_parent() -> object:
    """End the runs in a forked child, which has the runs but not their thread. Return what was inherited."""
    inherited = [(run, vars(run).copy(), leave) for run, leave in _living.items()]
    for leave in _living.values():
        leave()
    _living.clear()
    return inherited


in_child(_leave_to_parent)
# Registered after Ray's own exit function, and so called before Ray ends the agents.
atexit.register(_stop_living)
