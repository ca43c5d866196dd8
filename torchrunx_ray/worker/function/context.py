"""A worker's own launch, as its function may ask about it."""

import os
from dataclasses import dataclass

from torchrunx_ray.wire.messages import ForkWorker
from torchrunx_ray.wire.stop_board import StopAsked, StopReader


@dataclass(frozen=True)
class Context:
    """The worker's place in its launch, and the attempt that the worker belongs to."""

    rank: int
    local_rank: int
    world_size: int
    hostname: str
    attempt: int
    """Number of the attempt; 0 for the first one."""
    restarts: int
    """Number of restarts so far that count towards `max_restarts`."""

    @property
    def stop_asked(self) -> StopAsked | None:
        """The current request to stop; None if there is none. A look costs no system call.

        Ranks see a request at different moments, so they should agree before they leave a collective.
        """
        global _has_seen_stop
        if _stop_reader is None:
            raise RuntimeError(
                "stop_asked is known only in the worker that the context belongs to. Read it there, and pass it on."
            )
        asked = _stop_reader.read()
        if asked is not None:
            _has_seen_stop = True
        return asked


_context: Context | None = None
_stop_reader: StopReader | None = None
_has_seen_stop = False


def begin(wanted: ForkWorker, stop_reader: StopReader) -> None:
    """Set the context of this worker."""
    global _context, _stop_reader
    place, worker = wanted.place, wanted.worker
    _stop_reader = stop_reader
    os.register_at_fork(after_in_child=_forget)
    _context = Context(
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        hostname=worker.hostname,
        attempt=worker.attempt.number,
        restarts=worker.restarts,
    )


def _forget() -> None:
    """Make `context` raise in a process that the function forks. A check of the pid would cost a system call."""
    global _context
    _context = None


def has_seen_stop() -> bool:
    """Return True if the function has read a `stop_asked` that was set."""
    return _has_seen_stop


def context() -> Context:
    """Return the worker's place in its launch. Works in the main process of a worker only."""
    if _context is None:
        raise RuntimeError(
            "trx.context() was called outside of a worker. Call it in the function of a launch, in the worker's main "
            "process, and pass on what other processes need."
        )
    return _context
