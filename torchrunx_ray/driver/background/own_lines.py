"""A queue that takes the driver's own log lines out of the event loop."""

import asyncio
import atexit
import contextlib
import contextvars
import logging
import queue
import threading
import time

from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.driver.background.warn_once import WarnOnce

_MOST_WAITING = 10_000
"""Limit of the queue while a terminal is stopped. Later lines are dropped, to bound the driver's memory."""

_PATIENCE_S = 1.0
"""Time that a run waits at its end for handlers to write its lines."""


def driver_has_configured_logging() -> bool:
    return bool(logging.root.handlers or logging.getLogger("torchrunx_ray").handlers)


class OwnLines(logging.Filter):
    """A filter that queues records of the event loop's thread, and handles them in a separate thread.

    A `logging` handler may block, for example on a stopped terminal. In the event loop it would freeze
    every run of this process. Lines keep their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._diverted: int | None = None
        self._queue: queue.SimpleQueue[tuple[contextvars.Context, logging.LogRecord]] = (
            queue.SimpleQueue()
        )
        self._put = self._written = self._dropped = 0
        self._was_written = threading.Condition()
        self._warn_once = WarnOnce(
            "A logging handler failed on a log message of torchrunx_ray. Further failures are not reported: %s"
        )

    def divert_this_thread(self) -> None:
        """Queue the records of the calling thread from now on."""
        writing = threading.Thread(
            target=self._write_all, name="torchrunx_ray log lines", daemon=True
        )
        try:
            writing.start()
        except RuntimeError:  # a limit on threads: the loop has to write its lines itself
            return
        self._diverted = threading.get_ident()
        logging.getLogger("torchrunx_ray").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass records of other threads; queue records of the diverted thread."""
        if threading.get_ident() != self._diverted:
            return True
        if self._put - self._written >= _MOST_WAITING:
            self._dropped += 1
        else:
            self._put += 1
            # Some handlers keep records. An error refers to the run, and so to its arguments and values.
            if isinstance(record.args, tuple):
                record.args = tuple(
                    str(each) if isinstance(each, BaseException) else each for each in record.args
                )
            self._queue.put((contextvars.copy_context(), record))
        return False

    async def written(self) -> None:
        """Wait until all lines so far are written, or for _PATIENCE_S if a handler blocks."""
        put = self._put
        deadline = time.monotonic() + _PATIENCE_S
        while self._written < put and time.monotonic() < deadline:
            await asyncio.sleep(0.001)

    def wait_until_written(self) -> None:
        """Wait like `written`, without an event loop, at the end of the script."""
        put = self._put
        with self._was_written:
            self._was_written.wait_for(lambda: self._written >= put, _PATIENCE_S)

    def forget(self) -> object:
        """Reset the state in a forked child, which has neither the loop nor the writing thread. Return the old state."""
        inherited = vars(self).copy()
        logging.getLogger("torchrunx_ray").removeFilter(self)
        self.__init__()
        return inherited

    def _write_all(self) -> None:
        while True:
            context, record = self._queue.get()
            try:
                context.run(logging.getLogger(record.name).handle, record)
            except BaseException as error:  # including sys.exit in a handler
                self._warn_once.tell(error)
            # An error in the record refers to the run and its arguments, and the next record may be hours away.
            del context, record
            self._tell_of_dropped()
            with self._was_written:
                self._written += 1
                self._was_written.notify_all()

    def _tell_of_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        if dropped:
            with contextlib.suppress(BaseException):
                logging.getLogger("torchrunx_ray").warning(
                    "%d log messages were dropped here, because a logging handler blocked for too long",
                    dropped,
                )


own_lines = OwnLines()
"""The filter of this process."""

in_child(own_lines.forget)
atexit.register(own_lines.wait_until_written)
