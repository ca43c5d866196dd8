"""One output stream of a worker or the template."""

import asyncio
import contextlib
import fcntl
import os
import struct
import termios

from torchrunx_ray.agent.mailbox import Slot
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.messages import Printed, Stream

_CHUNK = 256 * 1024
"""Size requested for the pipe's buffer, and the most that one read takes."""
_PAUSE_S = 0.002
"""Pause between two reads. A read for every line would take a core from the workers."""
_PART_PAUSE_S = 0.05
"""Pause after a short part of a line, of which nothing can be shown yet."""
_SHORT_PART = 4 * 1024
_KEPT_LINES = 20
_KEPT_BYTES = 8 * 1024
_LONG_LINE = 400
"""Characters that are kept of a line."""
_CRASH = "Fatal Python error"
_BEFORE_CRASH = 5
"""Lines kept from before the crash report, which may show the cause. The report lists every thread."""


class Output:
    """A reader that takes what a pipe has, without blocking, and puts it into a mailbox.

    The reader pauses while the mailbox is full. It keeps the last lines for a failure's report.
    """

    def __init__(self, fd: int, local_rank: int | None, stream: Stream, mailbox: Slot) -> None:
        self._fd: int | None = fd
        self._local_rank = local_rank
        self._stream: Stream = stream
        self._mailbox = mailbox
        self._tail = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # the kernel limits the pipe memory of a user
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _CHUNK)
        self.resume()

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines; more of them after a crash, whose report begins with the place of the crash."""
        text = self._tail.decode(errors="backslashreplace").removesuffix("\n")
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n") if text]
        crash = next((i for i, line in enumerate(lines) if line.startswith(_CRASH)), len(lines))
        first = max(0, min(crash - _BEFORE_CRASH, len(lines) - _KEPT_LINES))
        return tuple(line[:_LONG_LINE] for line in lines[first:])

    def resume(self) -> None:
        if self._fd is not None and not self._mailbox.is_full:
            self._loop.add_reader(self._fd, self._read_and_pause)

    def drain_and_close(self) -> None:
        """Read what is in the pipe now and close it, even if another process holds it open."""
        self.drain()
        self._close()

    def drain(self) -> None:
        """Read what is in the pipe now, even if the mailbox is full."""
        if self._fd is None:
            return
        (waiting,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, b"\0" * 4))
        while waiting > 0 and (data := self._read_some()):
            waiting -= len(data)

    def _read_and_pause(self) -> None:
        data = self._read_some()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            part = self._tail.rpartition(b"\n")[2]
            can_be_shown = b"\n" in data or b"\r" in part
            is_waited_for = can_be_shown or len(part) > _SHORT_PART
            self._loop.call_later(_PAUSE_S if is_waited_for else _PART_PAUSE_S, self.resume)

    def _read_some(self) -> bytes:
        assert self._fd is not None
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return b""
        if data:
            self._put(data)
        else:
            self._close()
        return data

    def _close(self) -> None:
        if self._fd is None:
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = None
        if self._tail and not self._tail.endswith(b"\n"):
            self._put(b"\n")

    def _put(self, data: bytes) -> None:
        self._tail = (self._tail + data[-_KEPT_BYTES:])[-_KEPT_BYTES:]
        self._mailbox.put(Printed(self._local_rank, self._stream, data, now_ns()))
