"""Sources of output, and the sinks that take it."""

import logging
from dataclasses import dataclass
from typing import Protocol

from torchrunx_ray.driver.output.lines import Cut
from torchrunx_ray.driver.terminal.console import TextStream
from torchrunx_ray.wire.records import WorkerRecord

ROOT = "torchrunx_ray"
"""Name of the parent of the hosts' and workers' loggers."""

LEVELS: dict[TextStream, int] = {"stdout": logging.INFO, "stderr": logging.ERROR}


@dataclass(frozen=True)
class Speaker:
    """A source of output: a worker, or a host's template if `local_rank` is None.

    In a template only imports print.
    """

    hostname: str
    local_rank: int | None
    rank: int | None
    is_first_host: bool

    @property
    def label(self) -> str:
        return f"{self.hostname}:{'template' if self.rank is None else self.rank}"

    @property
    def place(self) -> tuple[str, int | None]:
        """The worker's place on its host, by which its file is named. Another attempt may give it another rank."""
        return self.hostname, self.local_rank

    @property
    def logger_name(self) -> str:
        name = f"{ROOT}.{self.hostname}"
        return name if self.local_rank is None else f"{name}.{self.local_rank}"

    def logger_level(self) -> int:
        """Return the level of the nearest logger with a level, from the worker's up to ROOT, else NOTSET.

        The root logger's level applies to this process's own records, not to the output of workers.
        """
        host = logging.getLogger(f"{ROOT}.{self.hostname}")
        for logger in (logging.getLogger(self.logger_name), host, logging.getLogger(ROOT)):
            if logger.level:
                return logger.level
        return logging.NOTSET

    @property
    def record_level(self) -> int:
        """Lowest level of the worker's `logging` records that the driver takes; INFO by default."""
        return self.logger_level() or logging.INFO


class Sink(Protocol):
    """A destination of output, called in one thread per run."""

    def begin_attempt(self, number: int) -> None:
        """Note that the output that follows is of this attempt. Most sinks need not know."""

    def chunk(self, who: Speaker, stream: TextStream, cut: Cut, time_s: float) -> None:
        """Take a piece of a stream."""
        if cut.lines:
            self.text(who, stream, cut.lines, time_s)

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:
        """Take whole lines."""
        ...

    def record(self, who: Speaker, record: WorkerRecord) -> None: ...

    def host_line(self, who: Speaker, line: str, time_s: float) -> None:
        """Take a line about an event on a host. Only files and handlers for a host use this."""

    def close(self) -> None:
        """Give back what the sink has opened. Most have opened nothing."""
