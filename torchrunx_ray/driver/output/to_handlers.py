"""A sink for the handlers that were passed to a launch."""

import logging
import sys
import threading
from collections.abc import Sequence
from typing import ClassVar

from torchrunx_ray.driver.background.warn_once import WarnOnce
from torchrunx_ray.driver.output.handlers import Only
from torchrunx_ray.driver.output.log_record import as_log_record, new_record
from torchrunx_ray.driver.output.speaker import LEVELS, Sink, Speaker, TextStream
from torchrunx_ray.wire.records import WorkerRecord


class ToHandlers(Sink):
    """A sink that passes records to handlers.

    Records are made only if a handler takes them. Each handler's failure is reported once.
    """

    def __init__(
        self, run_name: str, handlers: Sequence[logging.Handler], *, are_ours: bool
    ) -> None:
        self._run_name = run_name
        self._are_ours = are_ours
        self._reporters = [_Reporter.of(handler) for handler in handlers]

    @property
    def level(self) -> int:
        """Lowest level of a worker's `logging` that some handler takes."""
        return min((each.handler.level or logging.INFO for each in self._reporters), default=100)

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:
        level = LEVELS[stream]
        takers = self._takers(who, level)
        if takers:
            name = logging.getLevelName(level)
            for line in lines[:-1].split("\n"):
                self._hand(new_record(self._run_name, who, level, name, time_s, line), takers)

    def record(self, who: Speaker, record: WorkerRecord) -> None:
        takers = self._takers(who, record.least_level)
        if takers:
            self._hand(as_log_record(self._run_name, who, record), takers)

    def host_line(self, who: Speaker, line: str, time_s: float) -> None:
        takers = [each for each in self._takers(who, logging.INFO) if _wants_hosts(each.handler)]
        if takers:
            self._hand(new_record(self._run_name, who, logging.INFO, "INFO", time_s, line), takers)

    def close(self) -> None:
        """Flush the handlers, and close them if a function made them for this launch."""
        for reporter in self._reporters:
            try:
                reporter.handler.flush()
                if self._are_ours:
                    reporter.handler.close()
            except BaseException as error:
                reporter.warn_once.tell(error)
            reporter.release()

    def _takers(self, who: Speaker, level: int) -> "list[_Reporter]":
        if level < who.logger_level():
            return []
        return [
            each
            for each in self._reporters
            if level >= (each.handler.level or logging.INFO)
            and all(only.takes(who) for only in each.handler.filters if isinstance(only, Only))
        ]

    def _hand(self, record: logging.LogRecord, takers: "Sequence[_Reporter]") -> None:
        for taker in takers:
            try:
                taker.handler.handle(record)
            except BaseException as error:  # including sys.exit
                taker.warn_once.tell(error)


def _wants_hosts(handler: logging.Handler) -> bool:
    return any(isinstance(each, Only) and each.is_for_hosts for each in handler.filters)


class _Reporter:
    """Reports a handler's errors once, instead of a traceback on stderr for every line.

    Replaces the handler's `handleError`. Several runs may share a handler; the last run to end restores
    the original `handleError`.
    """

    _living: ClassVar[dict[int, "_Reporter"]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, handler: logging.Handler) -> None:
        self.handler = handler
        self._had = vars(handler).get("handleError")
        self._runs = 0
        self.warn_once = WarnOnce(
            "%r of log_handlers failed. The launch continues, and further failures are not reported: %s",
            handler,
        )
        vars(handler)["handleError"] = self._handle_error

    @classmethod
    def of(cls, handler: logging.Handler) -> "_Reporter":
        with cls._lock:
            if id(handler) not in cls._living:
                cls._living[id(handler)] = cls(handler)
            reporter = cls._living[id(handler)]
            reporter._runs += 1
            return reporter

    def release(self) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                del self._living[id(self.handler)]
                vars(self.handler).pop("handleError")
                if self._had is not None:
                    vars(self.handler)["handleError"] = self._had

    def _handle_error(self, _record: logging.LogRecord) -> None:
        self.warn_once.tell(sys.exc_info()[1])
