"""Output of workers, with the logger names and levels that torchrunx uses."""

import logging
from typing import Any

from torchrunx_ray.driver.output.handlers import LINE_FORMAT, Only
from torchrunx_ray.driver.output.speaker import ROOT, Speaker
from torchrunx_ray.driver.output.to_files import ToFiles, default_files
from torchrunx_ray.torchrunx.utils.log_handling import RedirectHandler

_THEIRS = "torchrunx"


def named_as_there(handlers: Any) -> list[logging.Handler]:
    """Make handlers of a launch see torchrunx's logger names; a handler without a level takes every level."""
    if not _is_list(handlers):
        raise TypeError(
            f"handler_factory returned {handlers!r}: expected a list of logging handlers."
        )
    made: list[logging.Handler] = list(handlers)  # the launch checks the items
    for handler in made:
        if isinstance(handler, logging.Handler):  # pyright: ignore[reportUnnecessaryIsInstance]
            if not handler.level:
                handler.setLevel(1)  # our launches treat NOTSET as INFO
            if _rename not in handler.filters:
                handler.filters.insert(0, _rename)  # before the user's filters, which may use names
    return made


def default_handlers_of_any_hosts() -> list[logging.Handler]:
    """Return handlers like `default_handlers`, for hosts that Ray has not chosen yet."""
    redirect = RedirectHandler(_least_level_of_loggers())
    redirect.addFilter(_is_of_first)
    files = default_files()
    return [redirect] if files is None else [redirect, _FileOfEach(files)]


class _FileOfEach(logging.Handler):
    """A handler that writes a file for each worker and each host's agent that has output."""

    def __init__(self, files: ToFiles) -> None:
        super().__init__(files.level)
        self._files = files
        everybody = Only(None, None, None)
        everybody.is_for_hosts = True
        self.addFilter(everybody)
        self.setFormatter(LINE_FORMAT)

    def emit(self, record: logging.LogRecord) -> None:
        said: dict[str, Any] = vars(record)
        who = Speaker(said["hostname"], said["local_rank"], said["rank"], said["is_first_host"])
        self._files.append(who, f"{self.format(record)}\n")


def _rename(record: logging.LogRecord) -> bool:
    """Rename a record, as a filter that passes every record. The handlers of a launch share a record."""
    if record.name.startswith(f"{ROOT}."):
        record.name = _THEIRS + record.name.removeprefix(ROOT)
        said: dict[str, Any] = vars(record)
        logger = said.get("worker_logger", "root")
        if logger != "root" and not said["is_formatted"]:
            record.msg = f"{logger}:{record.msg}"
    return True


def _is_of_first(record: logging.LogRecord) -> bool:
    said: dict[str, Any] = vars(record)
    return said["rank"] == 0 or (said["rank"] is None and said["is_first_host"])


def _least_level_of_loggers() -> int:
    """Return the lowest level of torchrunx's loggers: records below that level need not be sent."""
    known = [
        name for name in list(logging.root.manager.loggerDict) if name.startswith(f"{_THEIRS}.")
    ]
    return min(logging.getLogger(name).getEffectiveLevel() for name in [_THEIRS, *known])


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
