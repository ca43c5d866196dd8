"""The driver's own log lines, on their way out of the event loop."""

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
"""Lines that wait for a stopped terminal; later ones are dropped, since the driver's memory is bounded."""

_PATIENCE_S = 1.0
"""Time that a run waits at its end for handlers to take its lines."""


def driver_has_configured_logging() -> bool:
    return bool(logging.root.handlers or logging.getLogger("torchrunx_ray").handlers)


class OwnLines(logging.Filter):
    """Takes what is logged in the event loop's thread, and hands it to the loggers in a thread of its own.

    A handler of `logging` may block, as on a stopped terminal. In the event loop it would freeze
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
            "A handler of logging failed on a line of torchrunx_ray's own, and is not reported again: %s"
        )

    def divert_this_thread(self) -> None:
        """Have handlers run in another thread than this one from now on."""
        writing = threading.Thread(
            target=self._write_all, name="torchrunx_ray log lines", daemon=True
        )
        try:
            writing.start()
        except RuntimeError:  # a limit on threads: the loop has to write them itself
            return
        self._diverted = threading.get_ident()
        logging.getLogger("torchrunx_ray").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass what comes from other threads; keep the rest for ours."""
        if threading.get_ident() != self._diverted:
            return True
        if self._put - self._written >= _MOST_WAITING:
            self._dropped += 1
        else:
            self._put += 1
            self._queue.put((contextvars.copy_context(), record))
        return False

    async def written(self) -> None:
        """Wait until all lines so far are written, but not for ever for a handler that blocks."""
        put = self._put
        deadline = time.monotonic() + _PATIENCE_S
        while self._written < put and time.monotonic() < deadline:
            await asyncio.sleep(0.001)

    def wait_until_written(self) -> None:
        """The same for the end of the script."""
        put = self._put
        with self._was_written:
            self._was_written.wait_for(lambda: self._written >= put, _PATIENCE_S)

    def forget(self) -> None:
        """In a forked child, which has neither the loop nor our thread."""
        logging.getLogger("torchrunx_ray").removeFilter(self)
        self.__init__()

    def _write_all(self) -> None:
        while True:
            context, record = self._queue.get()
            try:
                context.run(logging.getLogger(record.name).handle, record)
            except BaseException as error:  # a sys.exit in a handler, too
                self._warn_once.tell(error)
            self._tell_of_dropped()
            with self._was_written:
                self._written += 1
                self._was_written.notify_all()

    def _tell_of_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        if dropped:
            with contextlib.suppress(BaseException):
                logging.getLogger("torchrunx_ray").warning(
                    "%d lines are missing here: a handler of logging took none for long", dropped
                )


own_lines = OwnLines()
"""The one of this process."""

in_child(own_lines.forget)
atexit.register(own_lines.wait_until_written)
