"""Launch a Python function on many workers of a Ray cluster, in one torch.distributed group.

import torchrunx_ray as trx

result = trx.launch(train, func_args=("outputs",), hostnames=2, workers_per_host=8)
result.rank(0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchrunx_ray.version import __version__

if TYPE_CHECKING:
    from torchrunx_ray.driver.launcher import Launcher, launch
    from torchrunx_ray.driver.output.handlers import (
        add_filter_to_handler,
        file_handler,
        stream_handler,
    )
    from torchrunx_ray.driver.report.history import AttemptRecord
    from torchrunx_ray.driver.report.results import LaunchResult
    from torchrunx_ray.driver.report.workers import WorkerInfo
    from torchrunx_ray.driver.run import Run
    from torchrunx_ray.driver.session import Session
    from torchrunx_ray.errors import (
        AgentFailedError,
        LaunchError,
        LaunchTimeoutError,
        PayloadError,
        PlacementError,
        PreloadError,
        RemoteFailure,
        WorkerFailedError,
    )
    from torchrunx_ray.wire.stop_board import StopAsked
    from torchrunx_ray.worker.function.context import Context, context

__all__ = [
    "AgentFailedError",
    "AttemptRecord",
    "Context",
    "LaunchError",
    "LaunchResult",
    "LaunchTimeoutError",
    "Launcher",
    "PayloadError",
    "PlacementError",
    "PreloadError",
    "RemoteFailure",
    "Run",
    "Session",
    "StopAsked",
    "WorkerFailedError",
    "WorkerInfo",
    "__version__",
    "add_filter_to_handler",
    "context",
    "file_handler",
    "launch",
    "stream_handler",
]

# Imported on first use, since workers import this package and must not import ray.
_HOMES = {
    "Launcher": "torchrunx_ray.driver.launcher",
    "launch": "torchrunx_ray.driver.launcher",
    "LaunchResult": "torchrunx_ray.driver.report.results",
    "add_filter_to_handler": "torchrunx_ray.driver.output.handlers",
    "file_handler": "torchrunx_ray.driver.output.handlers",
    "stream_handler": "torchrunx_ray.driver.output.handlers",
    "Run": "torchrunx_ray.driver.run",
    "Session": "torchrunx_ray.driver.session",
    "AttemptRecord": "torchrunx_ray.driver.report.history",
    "StopAsked": "torchrunx_ray.wire.stop_board",
    "WorkerInfo": "torchrunx_ray.driver.report.workers",
    "Context": "torchrunx_ray.worker.function.context",
    "context": "torchrunx_ray.worker.function.context",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES.get(name, "torchrunx_ray.errors")), name)
    globals()[name] = found  # a training loop may use `trx.context` in every step
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
