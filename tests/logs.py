"""What was logged: records that a handler kept, and lines of log files."""

import logging
import re
from typing import Any

HEAD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d:[A-Z]+: ")
"""Of a record, in a file."""


class Kept(logging.Handler):
    """Keeps the records that it is given."""

    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(record.levelname, record.getMessage()) for record in self.records]
