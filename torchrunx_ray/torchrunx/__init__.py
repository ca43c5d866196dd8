"""The API of torchrunx 0.4 on top of torchrunx_ray, for scripts written for torchrunx.

import torchrunx_ray.torchrunx as torchrunx

This package only translates. docs/from_torchrunx.md describes the differences.
"""

from typing import TYPE_CHECKING, Any

from torchrunx_ray.torchrunx.launcher import DEFAULT_ENV_VARS_FOR_COPY, Launcher
from torchrunx_ray.torchrunx.utils.errors import AgentFailedError, WorkerFailedError

if TYPE_CHECKING:
    from torchrunx_ray.driver.report.results import LaunchResult

__version__ = "0.4.0"
"""Version of torchrunx that this package replaces, since scripts compare it."""

__all__ = [
    "DEFAULT_ENV_VARS_FOR_COPY",
    "AgentFailedError",
    "LaunchResult",
    "Launcher",
    "WorkerFailedError",
]


def __getattr__(name: str) -> Any:
    """Import LaunchResult on first use, since workers import this module and must not import ray."""
    if name == "LaunchResult":
        import torchrunx_ray as trx

        return trx.LaunchResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
