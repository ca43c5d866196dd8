"""A sink for the handlers that a launch was given."""

import logging
import sys
from collections.abc import Callable, Sequence

from torchrunx_ray.driver.logs.handlers import Only
from torchrunx_ray.driver.logs.log_record import as_log_record, new_record
from torchrunx_ray.driver.logs.speaker import LEVELS, Speaker, TextStream
from torchrunx_ray.wire.records import WorkerRecord

logger = logging.getLogger("torchrunx_ray")


class ToHandlers:
    """Records are made only where a handler takes them. One that fails is reported once."""

    def __init__(self, handlers: Sequence[logging.Handler], *, are_ours: bool) -> None:
        self._handlers = list(handlers)
        self._are_ours = are_ours
        self._reported: set[int] = set()
        for handler in handlers:
            vars(handler)["handleError"] = self._reporter(handler)

    @property
    def level(self) -> int:
        """From which on some handler takes what `logging` in a worker says."""
        return min((handler.level or logging.INFO for handler in self._handlers), default=100)

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:
        level = LEVELS[stream]
        takers = self._takers(who, level)
        if takers:
            name = logging.getLevelName(level)
            for line in lines[:-1].split("\n"):
                self._hand(new_record(who, level, name, time_s, line), takers)

    def record(self, who: Speaker, record: WorkerRecord) -> None:
        takers = self._takers(who, record.least_level)
        if takers:
            self._hand(as_log_record(who, record), takers)

    def close(self) -> None:
        """Flush them; those that a function made for the launch nobody else closes."""
        for handler in self._handlers:
            try:
                handler.flush()
                if self._are_ours:
                    handler.close()
            except Exception as error:
                self._report(handler, error)
            vars(handler).pop("handleError", None)

    def _takers(self, who: Speaker, level: int) -> list[logging.Handler]:
        if level < who.logger_level():
            return []
        return [
            handler
            for handler in self._handlers
            if level >= handler.level
            and all(
                each.passes(who.hostname, who.local_rank, who.rank)
                for each in handler.filters
                if isinstance(each, Only)
            )
        ]

    def _hand(self, record: logging.LogRecord, takers: Sequence[logging.Handler]) -> None:
        for handler in takers:
            try:
                handler.handle(record)
            except Exception as error:
                self._report(handler, error)

    def _reporter(self, handler: logging.Handler) -> Callable[[logging.LogRecord], None]:
        """In place of a traceback on stderr for every line."""
        return lambda _record: self._report(handler, sys.exc_info()[1])

    def _report(self, handler: logging.Handler, error: BaseException | None) -> None:
        if id(handler) not in self._reported:
            self._reported.add(id(handler))
            logger.warning(
                "%r of log_handlers failed, and is not reported again; the run goes on: %s: %s",
                handler,
                type(error).__name__,
                error,
            )
