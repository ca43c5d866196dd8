"""A worker's own launch, as its function may ask about it."""

import os
from dataclasses import dataclass

from torchrunx_ray.wire.messages import ForkWorker


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


_context: Context | None = None
_worker_pid = 0


def begin(wanted: ForkWorker) -> None:
    """Set the context of this worker."""
    global _context, _worker_pid
    place, worker = wanted.place, wanted.worker
    _worker_pid = os.getpid()
    _context = Context(
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        hostname=worker.hostname,
        attempt=worker.attempt.number,
        restarts=worker.restarts,
    )


def context() -> Context:
    """Return the worker's place in its launch. Works in the main process of a worker only."""
    if _context is None or os.getpid() != _worker_pid:
        raise RuntimeError(
            "trx.context() was called outside of a worker. Call it in the function of a launch, in the worker's main "
            "process, and pass on what other processes need."
        )
    return _context
