"""A worker's Python stacks, for whoever asks what it is doing."""

import asyncio
import os
import signal
from pathlib import Path

from torchrunx_ray.agent.mailbox import Mailbox
from torchrunx_ray.wire.messages import Printed

_PAUSE_S = 0.05
"""Without a word for so long the answer is taken as it is: faulthandler says nothing at its end."""

_LAST_FRAME = b" in _run_module_as_main\n"
"""Where the main thread's stack ends, which comes last."""


class StackReader:
    """Asks one worker by SIGUSR2: faulthandler answers also while C code holds the GIL.

    What comes unasked, since somebody else sent that signal, is shown as what the worker printed.
    """

    def __init__(self, local_rank: int, mailbox: Mailbox) -> None:
        self._local_rank = local_rank
        self._mailbox = mailbox
        self._loop = asyncio.get_running_loop()
        self._fd, self.theirs = os.pipe()
        self._answer = b""
        self._is_asked = False
        """Until the answer has come, also when nobody waits for it any more."""
        self._said_more = asyncio.Event()
        self._turn = asyncio.Lock()
        self._closed = False
        os.set_blocking(self._fd, False)
        self._loop.add_reader(self._fd, self._read)

    async def ask(self, pid: int, within_s: float) -> str:
        """All threads' stacks, as faulthandler prints them; empty where it does not answer."""
        async with self._turn:
            if self._closed or not _handles_usr2(pid):
                return ""
            self._answer, self._is_asked = b"", True
            try:
                os.kill(pid, signal.SIGUSR2)
            except ProcessLookupError:
                return ""
            await self._until_whole(within_s)
            if self._answer:
                self._is_asked = False
            return self._answer.decode(errors="backslashreplace")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._said_more.set()

    async def _until_whole(self, within_s: float) -> None:
        deadline = self._loop.time() + within_s
        while not (self._closed or self._answer.endswith(_LAST_FRAME)):
            pause_s = _PAUSE_S if self._answer else within_s
            self._said_more.clear()
            try:
                async with asyncio.timeout_at(min(deadline, self._loop.time() + pause_s)):
                    await self._said_more.wait()
            except TimeoutError:
                return

    def _read(self) -> None:
        data = os.read(self._fd, 2**16)
        if not data:
            self.close()
            return
        self._answer += data
        if self._is_asked:
            if not self._turn.locked() and self._answer.endswith(_LAST_FRAME):
                self._answer, self._is_asked = b"", False  # nobody waits for it any more
            self._said_more.set()
            return
        lines, newline, rest = self._answer.rpartition(b"\n")
        self._answer = rest
        if newline:
            self._mailbox.put(Printed(self._local_rank, "stderr", lines + newline))


def _handles_usr2(pid: int) -> bool:
    """Not yet so in a process that was just forked: the signal would kill it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)
