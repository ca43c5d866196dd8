"""A worker's Python stacks, for whoever asks what it is doing."""

import asyncio
import os
import signal
from pathlib import Path

from torchrunx_ray.agent.mailbox import Mailbox
from torchrunx_ray.wire.messages import Printed

_ANSWER_S = 1.0
"""For a worker to begin its answer: one that swaps, or is stopped, may not."""

_PAUSE_S = 0.1
"""Without a word for so long the answer is taken as it is: faulthandler says nothing at its end."""

_LAST_FRAME = b" in _run_module_as_main\n"
"""Where the main thread's stack ends, which comes last."""


class Stacks:
    """Asks one worker by SIGUSR2: faulthandler answers also while C code holds the GIL.

    What comes unasked, since somebody else sent that signal, is shown as what the worker printed.
    """

    def __init__(self, local_rank: int, mailbox: Mailbox) -> None:
        self._local_rank = local_rank
        self._mailbox = mailbox
        self._loop = asyncio.get_running_loop()
        self._fd, self.theirs = os.pipe()
        self._answer: bytearray | None = None
        self._said_more = asyncio.Event()
        self._turn = asyncio.Lock()
        self._closed = False
        os.set_blocking(self._fd, False)
        self._loop.add_reader(self._fd, self._read)

    async def ask(self, pid: int) -> str:
        """All threads' stacks, as faulthandler prints them; empty where it does not answer."""
        async with self._turn:
            if self._closed or not _handles_usr2(pid):
                return ""
            self._answer = bytearray()
            try:
                os.kill(pid, signal.SIGUSR2)
                await self._until_whole(self._answer)
                return self._answer.decode(errors="backslashreplace")
            except ProcessLookupError:
                return ""
            finally:
                self._answer = None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._said_more.set()

    async def _until_whole(self, answer: bytearray) -> None:
        wait_s = _ANSWER_S
        while not (self._closed or answer.endswith(_LAST_FRAME)):
            self._said_more.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._said_more.wait()
            except TimeoutError:
                return
            wait_s = _PAUSE_S

    def _read(self) -> None:
        data = os.read(self._fd, 2**16)
        if not data:
            self.close()
        elif self._answer is None:
            self._mailbox.put(Printed(self._local_rank, "stderr", data))
        else:
            self._answer += data
            self._said_more.set()


def _handles_usr2(pid: int) -> bool:
    """Not yet so in a process that was just forked: the signal would kill it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)
