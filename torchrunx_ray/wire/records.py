"""A record of `logging` as one line, for the way from a worker to the driver."""

import json
import logging
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class WorkerRecord:
    """The parts of a worker's record that the driver needs."""

    level: int
    level_name: str
    logger: str
    created: float
    path: str | None
    line: int | None
    function: str | None
    text: str
    """The formatted message, with the exception's text."""
    is_configured: bool
    """True if the function has set up the handler, with its own format and level."""

    @property
    def least_level(self) -> int:
        """Level to compare with the driver's level.

        At least INFO for a handler of the function, since the function wants such records shown.
        """
        return max(self.level, logging.INFO) if self.is_configured else self.level


def as_line(record: logging.LogRecord, text: str, *, is_configured: bool) -> bytes:
    """Return the record and its formatted text as one line."""
    parts = WorkerRecord(
        record.levelno,
        record.levelname,
        record.name,
        record.created,
        record.pathname,
        record.lineno,
        record.funcName,
        text,
        is_configured,
    )
    return json.dumps(astuple(parts)).encode() + b"\n"


def from_line(line: str) -> WorkerRecord | None:
    """Return the record; None if the line is garbled because forked processes of the function wrote at once."""
    try:
        return WorkerRecord(*json.loads(line))
    except (ValueError, TypeError):
        return None
