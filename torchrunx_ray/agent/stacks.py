"""A worker's Python stacks, on request."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from torchrunx_ray.agent.mailbox import Slot
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.messages import END_OF_STACKS, Printed, StacksWanted

_LAST_FRAME = b" in _run_module_as_main\n"
"""End of the main thread's stack, which comes last. faulthandler itself writes no end mark."""


class StackReader:
    """A reader of one worker's stacks.

    A thread of the worker answers; if C code holds the GIL, faulthandler answers instead. If another process sends
    faulthandler's signal, the stacks are shown as output of the worker.
    """

    def __init__(self, local_rank: int, mailbox: Slot) -> None:
        self._local_rank = local_rank
        self._mailbox = mailbox
        self._loop = asyncio.get_running_loop()
        self._ours, theirs = socket.socketpair()
        self.theirs = theirs.detach()
        self._answer = b""
        self._is_owed = False
        """True while the worker's thread owes an answer, which may come after `ask` has timed out."""
        self._said_more = asyncio.Event()
        self._turn = asyncio.Lock()
        self._ours.setblocking(False)
        self._loop.add_reader(self._ours, self._read)

    async def ask(self, pid: int, wanted: StacksWanted) -> str:
        """Return all threads' stacks as faulthandler prints them; empty if the worker does not answer."""
        async with self._turn:
            self._answer = b""
            if not self._is_owed:
                self._is_owed = True
                with contextlib.suppress(OSError):  # the worker has ended
                    self._ours.send(b"?")
            await self._until(lambda: not self._is_owed, wanted.thread_s)
            left_s = wanted.within_s - wanted.thread_s
            if not self._answer and left_s > 0 and handles_usr2(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR2)
                await self._until(lambda: self._answer.endswith(_LAST_FRAME), left_s)
            answer, self._answer = self._answer, b""
            return answer.decode(errors="backslashreplace")

    def close(self) -> None:
        if self._ours.fileno() >= 0:
            self._loop.remove_reader(self._ours)
            self._ours.close()
            self._said_more.set()

    async def _until(self, is_whole: Callable[[], bool], within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._ours.fileno() >= 0 and not is_whole():
                    self._said_more.clear()
                    await self._said_more.wait()

    def _read(self) -> None:
        try:
            data = self._ours.recv(2**16)
        except ConnectionResetError:  # the worker ended without reading the request
            data = b""
        if not data:
            self.close()
            return
        answer, end, _ = (self._answer + data).partition(END_OF_STACKS)
        was_owed, self._is_owed = self._is_owed, self._is_owed and not end
        is_awaited = self._turn.locked()
        self._answer = answer if is_awaited else b""
        if is_awaited:
            self._said_more.set()
        elif answer and not was_owed:  # what the thread still owed, nobody waits for any more
            self._mailbox.put(Printed(self._local_rank, "stacks", answer, now_ns()))


def handles_usr2(pid: int) -> bool:
    """Return True if a process handles SIGUSR2. A freshly forked process does not yet, and the signal would kill it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)
