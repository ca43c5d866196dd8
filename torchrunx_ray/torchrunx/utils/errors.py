"""torchrunx's errors."""

from dataclasses import dataclass

from torchrunx_ray.errors import AgentFailedError, WorkerFailedError

__all__ = ["AgentFailedError", "ExceptionFromWorker", "WorkerFailedError"]


@dataclass
class ExceptionFromWorker:
    """Nothing here makes one; it is there so that imports of it work."""

    exception: Exception
