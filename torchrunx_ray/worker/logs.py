"""What the function says through `logging` goes to the agent as records, not as text."""

import logging
import os
import sys
from typing import Any

from torchrunx_ray.wire.records import as_line

_PLAIN: type[Any] = logging.StreamHandler


def take_records(fd: int, level: int) -> None:
    """Have the root logger send all from this level on.

    The function may configure logging as if nobody had: a handler that it gives the root logger by
    `basicConfig`, for this process's stdout or stderr, sends records too, in the function's format.
    A record that another handler writes there is left to that, so that no line comes twice.
    """
    streams = (sys.stdout, sys.stderr)
    configure = logging.basicConfig
    sender = _Sender(fd, streams)

    def settle() -> None:
        root = logging.root
        root.handlers[:] = [_in_place_of(handler, fd, streams) for handler in root.handlers]
        if not any(isinstance(handler, _Sender) for handler in root.handlers):
            root.addHandler(sender)

    def basic_config(**options: Any) -> None:
        logging.root.removeHandler(sender)  # it configures nothing where there is a handler
        try:
            configure(**options)
        finally:
            settle()

    logging.basicConfig = basic_config
    logging.root.setLevel(level)
    settle()


def _in_place_of(handler: logging.Handler, fd: int, streams: tuple[Any, ...]) -> logging.Handler:
    if type(handler) is not _PLAIN or not _writes_to(handler, streams):
        return handler
    sender = _Sender(fd, streams)
    sender.setLevel(handler.level)
    sender.setFormatter(handler.formatter)
    for each in handler.filters:
        sender.addFilter(each)
    return sender


class _Sender(logging.Handler):
    def __init__(self, fd: int, streams: tuple[Any, ...]) -> None:
        super().__init__()
        self._fd = fd
        self._streams = streams

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
            if any(_writes_to(handler, self._streams) for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _writes_to(handler: logging.Handler, streams: tuple[Any, ...]) -> bool:
    """A StreamHandler, or one of rich's."""
    of_rich = getattr(getattr(handler, "console", None), "file", None)
    target = getattr(handler, "stream", of_rich)
    return target is not None and any(target is stream for stream in streams)
