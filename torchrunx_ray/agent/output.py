"""One stream of output of a worker or of the template, cut into whole lines."""

import asyncio
import os

from torchrunx_ray.agent.mailbox import Mailbox
from torchrunx_ray.wire.messages import Printed, Stream

_CHUNK = 256 * 1024
_KEPT_LINES = 20
_KEPT_BYTES = 8 * 1024


class Output:
    """Reads a pipe without blocking and puts whole lines into a mailbox.

    While the mailbox is full it does not read. The last lines are kept for a failure's report.
    """

    def __init__(self, fd: int, local_rank: int | None, stream: Stream, mailbox: Mailbox) -> None:
        self._fd: int | None = fd
        self._local_rank = local_rank
        self._stream: Stream = stream
        self._mailbox = mailbox
        self._partial = b""
        self._tail = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read_some)

    @property
    def last_lines(self) -> tuple[str, ...]:
        return tuple(self._tail.decode(errors="backslashreplace").splitlines()[-_KEPT_LINES:])

    def resume(self) -> None:
        if self._fd is not None:
            self._loop.add_reader(self._fd, self._read_some)

    def drain_and_close(self) -> None:
        """Take what is in the pipe now, without waiting for whoever else may hold it open."""
        while self._fd is not None and self._read_some():
            pass
        self._close()

    def _read_some(self) -> bool:
        assert self._fd is not None
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        whole, newline, rest = data.rpartition(b"\n")
        if newline:
            self._put(self._partial + whole + newline)
            self._partial = rest
        else:
            self._partial += data
        if self._mailbox.is_full:
            self._loop.remove_reader(self._fd)
        return True

    def _close(self) -> None:
        if self._fd is None:
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = None
        if self._partial:
            self._put(self._partial + b"\n")
            self._partial = b""

    def _put(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-_KEPT_BYTES:]
        self._mailbox.put(Printed(self._local_rank, self._stream, data))
