"""Sources of output, and the sinks that take it."""

import logging
from dataclasses import dataclass
from typing import Protocol

from torchrunx_ray.driver.terminal.screen import TextStream
from torchrunx_ray.wire.records import WorkerRecord

ROOT = "torchrunx_ray"
"""The logger above those of hosts and workers."""

LEVELS: dict[TextStream, int] = {"stdout": logging.INFO, "stderr": logging.ERROR}


@dataclass(frozen=True)
class Speaker:
    """A worker; or, with no local rank, a host's template, of which nothing but imports prints."""

    hostname: str
    local_rank: int | None
    rank: int | None
    is_first_host: bool

    @property
    def label(self) -> str:
        return f"{self.hostname}:{'template' if self.rank is None else self.rank}"

    @property
    def logger_name(self) -> str:
        name = f"{ROOT}.{self.hostname}"
        return name if self.local_rank is None else f"{name}.{self.local_rank}"

    def logger_level(self) -> int:
        """Level of its logger, or of the next one above up to ours; NOTSET if none is set.

        The root logger's own level is for what this process says, not for what workers print.
        """
        host = logging.getLogger(f"{ROOT}.{self.hostname}")
        for logger in (logging.getLogger(self.logger_name), host, logging.getLogger(ROOT)):
            if logger.level:
                return logger.level
        return logging.NOTSET

    @property
    def record_level(self) -> int:
        """From which on a driver that says nothing else takes what `logging` in the worker says."""
        return self.logger_level() or logging.INFO


class Sink(Protocol):
    """Takes what is said, in one thread per run."""

    def chunk(
        self,
        who: Speaker,
        stream: TextStream,
        text: str,  # noqa: ARG002
        lines: str,
        drawn: str,  # noqa: ARG002
        time_s: float,
    ) -> None:
        """Take a piece, the whole lines that are in it, and the line that is still drawn again."""
        if lines:
            self.text(who, stream, lines, time_s)

    def text(self, who: Speaker, stream: TextStream, lines: str, time_s: float) -> None:
        """Whole lines."""
        ...

    def record(self, who: Speaker, record: WorkerRecord) -> None: ...

    def host_line(self, who: Speaker, line: str, time_s: float) -> None:
        """Take what happened on a host; only files and handlers for a host want it."""

    def close(self) -> None: ...
