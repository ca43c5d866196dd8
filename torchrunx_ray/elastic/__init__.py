"""The parts of `torch.distributed.elastic` that people build on, driven by Ray: agent, rendezvous, health server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrunx_ray.elastic.agent import RayElasticAgent
    from torchrunx_ray.elastic.health import create_healthcheck_server
    from torchrunx_ray.elastic.rendezvous import RayRendezvous

__all__ = ["RayElasticAgent", "RayRendezvous", "create_healthcheck_server"]

# Imported on first use: every torchrun of this environment looks for the rendezvous, and must not import ray.
_HOMES = {
    "RayElasticAgent": "agent",
    "RayRendezvous": "rendezvous",
    "create_healthcheck_server": "health",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
