"""The function's `logging`, sent to the agent as records instead of text."""

import logging
import os
import sys
from typing import Any

from torchrunx_ray.wire.records import as_line

_PLAIN: type[Any] = logging.StreamHandler

_STDERR = 2


def take_records(fd: int, level: int) -> None:
    """Send records of at least this level that reach the root logger.

    The function may configure logging as if nobody had done so before. A stderr handler that it adds to the root
    logger by `basicConfig` also sends records, in the function's format. A record that another handler writes to
    stdout or stderr is not sent, so that no line appears twice.
    """
    configure = logging.basicConfig
    sender = _Sender(fd, level)

    def settle() -> None:
        root = logging.root
        root.handlers[:] = [_in_place_of(handler, fd) for handler in root.handlers]
        if not any(isinstance(handler, _Sender) for handler in root.handlers):
            root.addHandler(sender)

    def basic_config(**options: Any) -> None:
        logging.root.removeHandler(sender)  # basicConfig does nothing if there is a handler
        try:
            configure(**options)
        finally:
            settle()

    logging.basicConfig = basic_config
    logging.root.setLevel(min(level, logging.root.level))
    settle()


def _in_place_of(handler: logging.Handler, fd: int) -> logging.Handler:
    if type(handler) is not _PLAIN or _descriptor(handler) != _STDERR:
        return handler
    sender = _Sender(fd, handler.level)
    sender.setFormatter(handler.formatter)
    for each in handler.filters:
        sender.addFilter(each)
    return sender


class _Sender(logging.Handler):
    def __init__(self, fd: int, level: int) -> None:
        super().__init__(level)
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_written_by_others(record.name):
            return
        try:
            text = self.format(record)
            line = memoryview(as_line(record, text, is_configured=self.formatter is not None))
            while line:
                line = line[os.write(self._fd, line) :]
        except Exception:
            self.handleError(record)

    def _is_written_by_others(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(_descriptor(handler) in (1, _STDERR) for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _descriptor(handler: Any) -> int | None:
    """Return the descriptor that a StreamHandler, or a handler of rich, writes to."""
    of_rich = getattr(getattr(handler, "console", None), "file", None)
    stream = getattr(handler, "stream", of_rich)
    if stream is not None and stream in (sys.stdout, sys.stderr):
        # The function may have replaced sys.stdout or sys.stderr by an object of its own.
        return 1 if stream is sys.stdout else _STDERR
    try:
        return None if stream is None else stream.fileno()
    except (AttributeError, OSError, ValueError):  # such as an io.StringIO, or a closed file
        return None
