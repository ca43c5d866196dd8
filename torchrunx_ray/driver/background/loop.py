"""The driver's background thread, whose event loop executes every run of this process."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.driver.background.own_lines import own_lines

logger = logging.getLogger("torchrunx_ray")

P = ParamSpec("P")
T = TypeVar("T")

_STEP_S = 0.2

_DONE = "CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED"
"""States of a future that has ended."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def start(coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
    """Run a coroutine in the background. Cancelling the future cancels the coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine, running())


class End:
    """The end of a future, for threads in which Ctrl-C may be raised at any moment.

    A KeyboardInterrupt inside the future's own methods may leave the future's lock held for ever. The loop would
    then block on that lock.
    """

    def __init__(self, future: "concurrent.futures.Future[Any]") -> None:
        self.has_come = False
        self._lock = threading.Lock()
        self._lock.acquire()
        running().call_soon_threadsafe(future.add_done_callback, self)

    def wait(self, timeout: float) -> None:
        if self._lock.acquire(timeout=timeout):
            self._lock.release()

    def __call__(self, _: object) -> None:
        self.has_come = True
        self._lock.release()


def is_done(future: "concurrent.futures.Future[Any]") -> bool:
    """Return the same as `done()`, without taking the future's lock: Ctrl-C might leave the lock held."""
    untyped: Any = future  # the stubs have no private names
    return untyped._state in _DONE


_ends: "weakref.WeakKeyDictionary[concurrent.futures.Future[Any], End]" = (
    weakref.WeakKeyDictionary()
)


def wait(future: "concurrent.futures.Future[Any]", timeout: float | None = None) -> bool:
    """Wait in the user's thread. Returns True if the future is done.

    The wait wakes at short intervals to notice Ctrl-C: the kernel may deliver the signal to any thread, and
    Python handles the signal only when its main thread wakes.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    if (end := _ends.get(future)) is None:
        if is_done(future):
            return True
        end = _ends.setdefault(future, End(future))
    while not end.has_come:
        left_s = _STEP_S if deadline is None else min(_STEP_S, deadline - time.monotonic())
        if left_s <= 0:
            return False
        end.wait(left_s)
    return True


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a blocking call, such as a question to Ray's head.

    Unlike asyncio.to_thread, this uses a daemon thread: a call that never returns does not block the
    interpreter's exit. If the await is cancelled, the call itself goes on.
    """
    return await _answer(functools.partial(call, *args, **kwargs), is_skippable=False)


async def in_thread_only(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Await a call that may block for ever, such as a write to a stopped terminal.

    The call is skipped if no thread can be started, since it would block the loop.
    """
    await _answer(functools.partial(call, *args, **kwargs), is_skippable=True)


def _answer(call: Callable[[], T], *, is_skippable: bool) -> "asyncio.Future[T]":
    """Return the call's outcome, to await at once. If no thread can be started, the call is skipped or blocks.

    A waiter that is gone leaves no report of an unretrieved exception. asyncio.wrap_future would keep a call's
    result or exception until Python's gc runs.
    """
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
    work = functools.partial(_settle, answer, call)
    if not start_thread(work):
        if is_skippable:
            answer.set_result(None)
        else:
            work()
    return asyncio.shield(answer)


def _settle(answer: "asyncio.Future[T]", call: Callable[[], T]) -> None:
    """Call a function in this thread, and set its outcome on a future of the loop."""
    settle = answer.get_loop().call_soon_threadsafe
    try:
        settle(answer.set_result, call())
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            settle(answer.set_exception, error)
    finally:
        del answer  # an exception refers to this frame


def start_thread(work: Callable[[], None]) -> bool:
    """Call a function in a daemon thread. Returns False if no thread can be started."""
    context = contextvars.copy_context()  # a notebook uses the context to find a line's cell
    try:
        threading.Thread(
            target=context.run, args=(work,), name="torchrunx_ray call", daemon=True
        ).start()
    except RuntimeError:  # a limit of the host, or Python 3.12 after the script has ended
        return False
    return True


def is_called_in_one() -> bool:
    """Return True if a wait here would block one of the user's event loops.

    A notebook kernel's loop does not count: every cell blocks that loop, and Interrupt ends the wait.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    # A script may import ipykernel, too, through other libraries.
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is None or not kernel.IPKernelApp.initialized()


def waker(future: "concurrent.futures.Future[Any]") -> "asyncio.Future[None]":
    """Return a future of the running event loop that is done when `future` is done, whatever its outcome."""
    here = asyncio.get_running_loop()
    woken: asyncio.Future[None] = here.create_future()

    def wake(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            here.call_soon_threadsafe(lambda: woken.done() or woken.set_result(None))

    future.add_done_callback(wake)
    return woken


async def to_the_end(work: Awaitable[T], on_cancelled: Callable[[], None] | None = None) -> T:
    """Await work that must be completed, such as giving resources back.

    A cancellation during the work is raised after it; `on_cancelled` may make the work shorter.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    try:
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
                if on_cancelled is not None:
                    on_cancelled()
            except Exception:
                break  # task.result() below raises it
        if cancelled is not None:
            raise cancelled
        return task.result()
    finally:
        del cancelled, task  # an exception refers to this frame, and must not wait for Python's gc


def running() -> asyncio.AbstractEventLoop:
    """Return the background loop. The first call starts the loop and its thread."""
    global _loop
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            loop.set_exception_handler(_tell)
            threading.Thread(target=_serve, args=(loop,), name="torchrunx_ray", daemon=True).start()
            _loop = loop
        return _loop


def _tell(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an unhandled error with this package's logger: handlers of asyncio's logger would run in the loop."""
    logger.error(
        "error in the background thread: %s", context["message"], exc_info=context.get("exception")
    )


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop for ever.

    A sys.exit in a signal handler or a callback may fail its own run, but not the others.
    """
    own_lines.divert_this_thread()
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # asyncio lets only these out
            loop.run_forever()


def _forget() -> object:
    """Leave the loop in a forked child, which does not have its thread. Return what was inherited."""
    global _loop, _lock
    inherited = _loop, dict(_ends)
    _loop, _lock = None, threading.Lock()
    _ends.clear()
    return inherited


in_child(_forget)
