"""A record of `logging` on its way from a worker to the driver, as one line."""

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
    """The message, with the exception's text."""
    is_configured: bool
    """By a handler that the function has set up, with a format and a level of its own choice."""

    @property
    def least_level(self) -> int:
        """To be compared with what the driver takes: what the function wants shown is no DEBUG."""
        return max(self.level, logging.INFO) if self.is_configured else self.level


def as_line(record: logging.LogRecord, text: str, *, is_configured: bool) -> bytes:
    """The record with its text, which needs no other process to make it."""
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
    """None where two processes that the function forked have written at once."""
    try:
        return WorkerRecord(*json.loads(line))
    except (ValueError, TypeError):
        return None
