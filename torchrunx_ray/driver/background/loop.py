"""The driver's one background thread, in whose event loop every run of this process lives."""

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
    """Run a coroutine in the background; cancelling the future cancels it."""
    return asyncio.run_coroutine_threadsafe(coroutine, running())


class End:
    """A future's end, for threads in which Ctrl-C may be raised at any moment.

    A KeyboardInterrupt inside the future's own methods may leave the future's lock held for ever, and the loop
    would wait for that lock.
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
    """Return what `done()` does, without the future's lock: Ctrl-C might leave the lock held."""
    untyped: Any = future  # the stubs have no private names
    return untyped._state in _DONE


_ends: "weakref.WeakKeyDictionary[concurrent.futures.Future[Any], End]" = (
    weakref.WeakKeyDictionary()
)


def wait(future: "concurrent.futures.Future[Any]", timeout: float | None = None) -> bool:
    """Wait in the user's thread; return whether the future is done.

    In steps, for Ctrl-C: the kernel may hand the signal to any thread of the process, and Python
    acts on it only when its main thread wakes.
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
    """Await a call that blocks, such as one that asks Ray's head.

    In a daemon thread, unlike asyncio.to_thread, so that one that never returns does not hold
    the interpreter when the driver ends. When the await is cancelled the call itself goes on.
    """
    answer: asyncio.Future[T] = _unheard()
    work = functools.partial(_settle, answer, functools.partial(call, *args, **kwargs))
    if not start_thread(work):
        work()
    try:
        return await asyncio.shield(answer)
    finally:
        del answer, work  # a failure refers to this frame, and must not wait for Python's gc


async def in_thread_only(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Await a call that may block for ever, such as one that writes to a stopped terminal.

    It is left out where no thread can be started: here it would hold the loop.
    """
    answer: asyncio.Future[object] = _unheard()
    work = functools.partial(_settle, answer, functools.partial(call, *args, **kwargs))
    if not start_thread(work):
        return
    try:
        await asyncio.shield(answer)
    finally:
        del answer, work


def _unheard() -> "asyncio.Future[Any]":
    """Return a future whose failure may stay unheard: nobody may wait for it any more.

    asyncio.wrap_future would keep what a call returned or raised until Python's gc runs.
    """
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _settle(answer: "asyncio.Future[T]", call: Callable[[], T]) -> None:
    """Call it in a thread, and have the loop hear of what came of it."""
    settle = answer.get_loop().call_soon_threadsafe
    try:
        settle(answer.set_result, call())
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # that loop was closed meanwhile
            settle(answer.set_exception, error)
    finally:
        del answer  # a failure refers to this frame


def start_thread(work: Callable[[], None]) -> bool:
    """Do it in a daemon thread; False if no thread can be started."""
    context = contextvars.copy_context()  # a notebook knows by it whose cell a line belongs to
    try:
        threading.Thread(
            target=context.run, args=(work,), name="torchrunx_ray call", daemon=True
        ).start()
    except RuntimeError:  # a limit of the host; Python 3.12 starts none when the script has ended
        return False
    return True


def is_called_in_one() -> bool:
    """Return whether a wait here would block an event loop of the user's.

    The loop of a notebook's kernel is blocked by every cell; Interrupt ends such a wait.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    kernel = sys.modules.get(
        "ipykernel.kernelapp"
    )  # scripts import it, too, through other libraries
    return kernel is None or not kernel.IPKernelApp.initialized()


def waker(future: "concurrent.futures.Future[Any]") -> "asyncio.Future[None]":
    """A future of the running event loop, done when the other one is, whatever became of it."""
    here = asyncio.get_running_loop()
    woken: asyncio.Future[None] = here.create_future()

    def wake(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # that loop was closed meanwhile
            here.call_soon_threadsafe(lambda: woken.done() or woken.set_result(None))

    future.add_done_callback(wake)
    return woken


async def to_the_end(work: Awaitable[T]) -> T:
    """Await what must not be left half done, such as giving resources back.

    A cancellation meanwhile is raised afterwards.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:
            break  # raised again below
    if cancelled is not None:
        raise cancelled
    return task.result()


def running() -> asyncio.AbstractEventLoop:
    """The loop, in its thread; both start with the first launch."""
    global _loop
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            loop.set_exception_handler(_tell)
            threading.Thread(target=_serve, args=(loop,), name="torchrunx_ray", daemon=True).start()
            _loop = loop
        return _loop


def _tell(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what no task has taken as a line of ours: a handler of asyncio's logger would run in the loop."""
    logger.error("in the background: %s", context["message"], exc_info=context.get("exception"))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """For ever: a signal handler's or a callback's sys.exit may fail its run, not all of them."""
    own_lines.divert_this_thread()
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # all that asyncio lets out
            loop.run_forever()


def _forget() -> None:
    """A forked child has the loop but not its thread."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()
    _ends.clear()


in_child(_forget)
