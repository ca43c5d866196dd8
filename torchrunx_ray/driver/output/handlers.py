"""`logging` handlers for one worker's output, to pass to a launch."""

import logging
import os
import sys

from torchrunx_ray.driver.output.speaker import Speaker

_STREAM_FORMAT = "%(asctime)s:%(levelname)s:%(hostname)s[%(local_rank)s]: %(message)s"
LINE_FORMAT = logging.Formatter("%(asctime)s:%(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")


def add_filter_to_handler(
    handler: logging.Handler,
    hostname: str | None = None,
    local_rank: int | None = None,
    *,
    rank: int | None = None,
    log_level: int | str = logging.NOTSET,
) -> logging.Handler:
    """Restrict a launch's handler to one worker's output, and to a minimum level if given.

    Name the worker by hostname and local rank. If Ray chooses the hosts, name the worker by `rank`
    instead. A hostname without a local rank means the host's events and its template's output. Without
    any of these the handler takes the output of all workers. Returns the handler.
    """
    if rank is not None and (hostname is not None or local_rank is not None):
        raise ValueError("give rank, or hostname and local_rank, not both")
    if local_rank is not None and hostname is None:
        raise ValueError(f"local_rank={local_rank} needs a hostname; or give rank")
    handler.addFilter(Only(hostname, local_rank, rank))
    if log_level != logging.NOTSET:
        handler.setLevel(log_level)
    return handler


def file_handler(
    hostname: str | None = None,
    local_rank: int | None = None,
    file_path: str | os.PathLike[str] = "",
    *,
    rank: int | None = None,
    log_level: int | str = logging.NOTSET,
) -> logging.Handler:
    """Return a handler that writes one worker's output to a file.

    Name the worker as for `add_filter_to_handler`.
    """
    if not os.fspath(file_path):
        raise ValueError("file_path: expected the file to write to")
    handler = logging.FileHandler(
        file_path, delay=True, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(LINE_FORMAT)
    return add_filter_to_handler(handler, hostname, local_rank, rank=rank, log_level=log_level)


def stream_handler(
    hostname: str | None = None,
    local_rank: int | None = None,
    *,
    rank: int | None = None,
    log_level: int | str = logging.NOTSET,
) -> logging.Handler:
    """Return a handler that writes one worker's output to the driver's stdout.

    Name the worker as for `add_filter_to_handler`.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(_STREAM_FORMAT, "%Y-%m-%d %H:%M:%S"))
    return add_filter_to_handler(handler, hostname, local_rank, rank=rank, log_level=log_level)


class Only(logging.Filter):
    """A filter that passes one worker's output."""

    def __init__(self, hostname: str | None, local_rank: int | None, rank: int | None) -> None:
        super().__init__()
        self._hostname, self._local_rank, self._rank = hostname, local_rank, rank
        self.is_for_hosts = hostname is not None and local_rank is None
        """True if the handler takes the events of a host."""

    def takes(self, who: Speaker) -> bool:
        return self._passes(who.hostname, who.local_rank, who.rank)

    def __str__(self) -> str:
        if self._rank is not None:
            return f"rank {self._rank}"
        return f"{self._hostname}" + ("" if self._local_rank is None else f"[{self._local_rank}]")

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if the record passes.

        A record that is not a worker's has no host, and passes only if the filter passes all workers.
        """
        fields = vars(record)
        return self._passes(
            fields.get("hostname", ""), fields.get("local_rank"), fields.get("rank")
        )

    def _passes(self, hostname: str, local_rank: int | None, rank: int | None) -> bool:
        if self._rank is not None:
            return rank == self._rank
        wanted = self._hostname, self._local_rank
        return self._hostname is None or (hostname, local_rank) == wanted
