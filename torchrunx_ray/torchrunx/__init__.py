"""torchrunx 0.4 over torchrunx_ray: its names, for scripts that were written for it.

import torchrunx_ray.torchrunx as torchrunx

It translates, and adds nothing. docs/from_torchrunx.md tells what differs.
"""

from typing import TYPE_CHECKING, Any

from torchrunx_ray.torchrunx.launcher import DEFAULT_ENV_VARS_FOR_COPY, Launcher
from torchrunx_ray.torchrunx.utils.errors import AgentFailedError, WorkerFailedError

if TYPE_CHECKING:
    from torchrunx_ray.driver.report.results import LaunchResult

__version__ = "0.4.0"
"""Version of the torchrunx that this stands for, since scripts compare it."""

__all__ = [
    "DEFAULT_ENV_VARS_FOR_COPY",
    "AgentFailedError",
    "LaunchResult",
    "Launcher",
    "WorkerFailedError",
]


def __getattr__(name: str) -> Any:
    """A worker imports the script's modules and so this one, and must not import ray."""
    if name == "LaunchResult":
        import torchrunx_ray as trx

        return trx.LaunchResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
