"""A sink for a driver that has configured logging, whose loggers decide what is shown."""

import logging
from collections.abc import Callable, Iterator

from torchrunx_ray.driver.background.warn_once import WarnOnce
from torchrunx_ray.driver.output.log_record import as_log_record, new_record
from torchrunx_ray.driver.output.speaker import LEVELS, Sink, Speaker, TextStream
from torchrunx_ray.driver.report.progress import living
from torchrunx_ray.wire.records import WorkerRecord


class ToLoggers(Sink):
    """A sink that logs output to `torchrunx_ray.<hostname>.<local_rank>`, as if the driver had logged it.

    While another run is alive, the text of each record begins with the run's name.
    """

    def __init__(self, run_name: str, takes: Callable[[Speaker], bool]) -> None:
        self._run_name = run_name
        self._takes = takes
        self._warn_once = WarnOnce(
            "A logging handler failed on the output of workers. The launch continues, and further failures "
            "are not reported: %s"
        )

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:
        level = LEVELS[stream]
        if self._takes(who) and self._is_enabled(who, level):
            name = logging.getLevelName(level)
            records = (
                new_record(self._run_name, who, level, name, time_s, line)
                for line in lines[:-1].split("\n")
            )
            self._hand(who, records)

    def record(self, who: Speaker, record: WorkerRecord) -> None:
        if self._takes(who) and self._is_enabled(who, record.least_level):
            self._hand(who, iter([as_log_record(self._run_name, who, record)]))

    def _is_enabled(self, who: Speaker, level: int) -> bool:
        return level >= who.record_level and level > logging.root.manager.disable

    def _hand(self, who: Speaker, records: Iterator[logging.LogRecord]) -> None:
        target = logging.getLogger(who.logger_name)
        if target.disabled:
            return
        head = f"[{self._run_name}] " if len(living) > 1 else ""
        for record in records:
            record.msg = f"{head}{record.msg}"
            try:
                if target.filter(record):
                    target.callHandlers(record)
            except BaseException as error:  # including sys.exit
                self._warn_once.tell(error)
