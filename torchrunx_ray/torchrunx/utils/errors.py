"""torchrunx's errors."""

from dataclasses import dataclass

from torchrunx_ray.errors import AgentFailedError, WorkerFailedError

__all__ = ["AgentFailedError", "ExceptionFromWorker", "WorkerFailedError"]


@dataclass
class ExceptionFromWorker:
    """A class that exists only so that imports of it work; nothing creates it."""

    exception: Exception
