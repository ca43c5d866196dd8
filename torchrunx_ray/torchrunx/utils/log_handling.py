"""torchrunx's handlers for the output of agents and workers."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torchrunx_ray.driver.output.handlers import Only, file_handler
from torchrunx_ray.driver.output.to_files import default_files, new_directory

__all__ = ["RedirectHandler", "default_handlers", "file_handlers", "get_handler_filter"]


def get_handler_filter(
    hostname: str, local_rank: int | None, log_level: int = logging.NOTSET
) -> Callable[[logging.LogRecord], bool]:
    """Return a filter that passes the output of one worker, or of a host's agent if `local_rank` is None."""
    return _Passes(hostname, local_rank, log_level)


class _Passes(Only):
    def __init__(self, hostname: str, local_rank: int | None, log_level: int) -> None:
        super().__init__(hostname, local_rank, None)
        self._log_level = log_level

    def filter(self, record: logging.LogRecord) -> bool:
        return super().filter(record) and record.levelno >= self._log_level

    def __call__(self, record: logging.LogRecord) -> bool:
        return self.filter(record)


class RedirectHandler(logging.Handler):
    """A handler that passes records to the loggers `torchrunx.<hostname>[.<local_rank>]`, whose levels apply."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def file_handlers(
    hostnames: Sequence[str],
    workers_per_host: Sequence[int],
    log_dir: str | os.PathLike[str] = Path("torchrunx_logs"),
    log_level: int = logging.NOTSET,
) -> list[logging.Handler]:
    """Return a file handler for each agent and worker. The files are in a new directory named after the time."""
    directory = new_directory(Path(log_dir).absolute())
    places = [
        (hostname, local_rank)
        for hostname, workers in zip(hostnames, workers_per_host, strict=True)
        for local_rank in (None, *range(workers))
    ]
    return [
        file_handler(*place, directory / f"{_file_name(*place)}.log", log_level=log_level)
        for place in places
    ]


def default_handlers(
    hostnames: Sequence[str], workers_per_host: Sequence[int]
) -> list[logging.Handler]:
    """Return handlers that pass the first host's agent and worker to their loggers, and write all output to files.

    The files are in `$TORCHRUNX_LOG_DIR` and have records from level `$TORCHRUNX_LOG_LEVEL` on. If
    `$TORCHRUNX_LOG_DIR` is empty, no files are written.
    """
    handlers: list[logging.Handler] = []
    for local_rank in (None, 0):
        handlers.append(RedirectHandler())
        handlers[-1].addFilter(get_handler_filter(hostnames[0], local_rank))
    files = default_files()
    if files is not None:
        handlers += file_handlers(hostnames, workers_per_host, files.parent, files.level)
    return handlers


def _file_name(hostname: str, local_rank: int | None) -> str:
    return hostname if local_rank is None else f"{hostname}[{local_rank}]"
