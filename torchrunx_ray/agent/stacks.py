"""A worker's Python stacks, for whoever asks what it is doing."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from torchrunx_ray.agent.mailbox import Mailbox
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.messages import END_OF_STACKS, Printed, StacksWanted

_LAST_FRAME = b" in _run_module_as_main\n"
"""Mark at the end of the main thread's stack, which comes last; faulthandler itself marks no end."""


class StackReader:
    """Asks one worker: its thread that answers, or, where C code holds the GIL, faulthandler.

    What comes unasked, since somebody else sent faulthandler's signal, is shown as what the worker
    printed.
    """

    def __init__(self, local_rank: int, mailbox: Mailbox) -> None:
        self._local_rank = local_rank
        self._mailbox = mailbox
        self._loop = asyncio.get_running_loop()
        self._ours, theirs = socket.socketpair()
        self.theirs = theirs.detach()
        self._answer = b""
        self._is_owed = False
        """By the worker's thread; it may tell when nobody waits for it any more."""
        self._said_more = asyncio.Event()
        self._turn = asyncio.Lock()
        self._ours.setblocking(False)
        self._loop.add_reader(self._ours, self._read)

    async def ask(self, pid: int, wanted: StacksWanted) -> str:
        """All threads' stacks, as faulthandler prints them; empty where it does not answer."""
        async with self._turn:
            self._answer = b""
            if not self._is_owed:
                self._is_owed = True
                with contextlib.suppress(OSError):  # it has ended
                    self._ours.send(b"?")
            await self._until(lambda: not self._is_owed, wanted.thread_s)
            if not self._answer and handles_usr2(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR2)
                left_s = wanted.within_s - wanted.thread_s
                await self._until(lambda: self._answer.endswith(_LAST_FRAME), left_s)
            answer, self._answer = self._answer, b""
            return answer.decode(errors="backslashreplace")

    def close(self) -> None:
        if not self._is_closed():
            self._loop.remove_reader(self._ours)
            self._ours.close()
            self._said_more.set()

    def _is_closed(self) -> bool:
        return self._ours.fileno() < 0

    async def _until(self, is_whole: Callable[[], bool], within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not (is_whole() or self._is_closed()):
                    self._said_more.clear()
                    await self._said_more.wait()

    def _read(self) -> None:
        try:
            data = self._ours.recv(2**16)
        except ConnectionResetError:  # it left our question unread
            data = b""
        if not data:
            self.close()
            return
        answer, end, _ = (self._answer + data).partition(END_OF_STACKS)
        was_owed, self._is_owed = self._is_owed, self._is_owed and not end
        if self._turn.locked():
            self._answer = answer
            self._said_more.set()
        elif was_owed:
            self._answer = b""  # nobody waits for it any more
        else:
            lines, newline, self._answer = answer.rpartition(b"\n")
            if newline:
                self._mailbox.put(Printed(self._local_rank, "stderr", lines + newline, now_ns()))


def handles_usr2(pid: int) -> bool:
    """Not yet so in a process that was just forked: the signal would kill it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)
