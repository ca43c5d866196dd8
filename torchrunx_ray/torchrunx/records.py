"""Output of workers, under the names and at the levels that it has in torchrunx."""

import logging
from typing import Any

from torchrunx_ray.driver.output.handlers import LINE_FORMAT, Only
from torchrunx_ray.driver.output.speaker import ROOT, Speaker
from torchrunx_ray.driver.output.to_files import ToFiles, default_files
from torchrunx_ray.torchrunx.utils.log_handling import RedirectHandler

_THEIRS = "torchrunx"


def named_as_there(handlers: Any) -> list[logging.Handler]:
    """Let these handlers of a launch see their names; a handler without level takes every level."""
    if not _is_list(handlers):
        raise TypeError(
            f"handler_factory returned {handlers!r}: expected a list of handlers of logging."
        )
    made: list[logging.Handler] = list(handlers)  # a launch checks what is in it
    for handler in made:
        if isinstance(handler, logging.Handler):  # pyright: ignore[reportUnnecessaryIsInstance]
            if not handler.level:
                handler.setLevel(1)  # our launches take NOTSET for INFO
            if _rename not in handler.filters:
                handler.filters.insert(0, _rename)  # before the user's, which may look at names
    return made


def default_handlers_of_any_hosts() -> list[logging.Handler]:
    """Return `default_handlers` for hosts that Ray has not chosen yet."""
    redirect = RedirectHandler(_least_level_of_loggers())
    redirect.addFilter(_is_of_first)
    files = default_files()
    return [redirect] if files is None else [redirect, _FileOfEach(files)]


class _FileOfEach(logging.Handler):
    """Writes a file for each worker and each host's agent, where there is something to write."""

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
    """A filter, which passes everything. The handlers of a launch share a record."""
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
    """Return the lowest level that some logger takes: other records need not travel."""
    known = [
        name for name in list(logging.root.manager.loggerDict) if name.startswith(f"{_THEIRS}.")
    ]
    return min(logging.getLogger(name).getEffectiveLevel() for name in [_THEIRS, *known])


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
