"""What workers print, on the driver's own stdout and stderr."""

import asyncio
import queue
import sys
import threading
from typing import TextIO

from torchrunx_ray.wire.messages import Stream

_QUEUED = 64
"""Chunks that may wait for a slow terminal before the agents are asked for no more."""


class Console:
    """Writes in a thread of its own: a slow terminal stops the workers, not the driver's loop."""

    def __init__(self, world_size: int) -> None:
        self._show_who = world_size > 1
        self._queue: queue.Queue[tuple[str, Stream, bytes] | None] = queue.Queue()
        self._room = asyncio.Semaphore(_QUEUED)
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        threading.Thread(target=self._write_all, name="torchrunx_ray output", daemon=True).start()

    async def put(self, who: str, stream: Stream, data: bytes) -> None:
        """Queue whole lines; waits while too much is queued."""
        await self._room.acquire()
        self._queue.put((who, stream, data))

    async def drain(self) -> None:
        """Return when all that was put is written."""
        self._queue.put(None)
        await self._done.wait()

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except Exception:
                # The driver's stream is closed, or an object of the user's that cannot write.
                # There is nowhere left to say so, and the run goes on without it.
                pass
            finally:
                self._loop.call_soon_threadsafe(self._room.release)
        self._loop.call_soon_threadsafe(self._done.set)

    def _write(self, who: str, stream: Stream, data: bytes) -> None:
        text = data.decode(errors="backslashreplace")
        if self._show_who:
            lines = text.removesuffix("\n").split("\n")
            text = "".join(f"[{who}] {line}\n" for line in lines)
        target = sys.stdout if stream == "stdout" else sys.stderr
        target.write(_writable(text, target))
        target.flush()


def _writable(text: str, target: TextIO) -> str:
    """What the stream's encoding lacks is escaped, not lost."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
