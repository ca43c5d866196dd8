"""Elastic agents of torch and of ours, as tests use them."""

import os
import socket
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from torchrunx_ray.elastic import RayElasticAgent

_handlers: list[RendezvousHandler] = []


def spec_of(
    entrypoint: Callable[..., Any] | str,
    *args: object,
    backend: str = "ray",
    workers: int = 2,
    **more: Any,
) -> WorkerSpec:
    endpoint = f"localhost:{free_port()}"
    config = {"rank": 0} if backend == "static" else {}
    params = RendezvousParameters(backend, endpoint, "the run", 1, 1, **config)
    handler = handler_of(params)
    more = {"role": "trainer", "max_restarts": 0, "monitor_interval": 0.01} | more
    return WorkerSpec(
        local_world_size=workers, rdzv_handler=handler, entrypoint=entrypoint, args=args, **more
    )


def shut_down_handlers() -> None:
    while _handlers:
        _handlers.pop().shutdown()


def handler_of(params: RendezvousParameters) -> RendezvousHandler:
    """Return the handler, which ends with the test.

    As `elastic_launch` does it; the thread that keeps c10d's alive may otherwise be the one that collects it.
    """
    handler = get_rendezvous_handler(params)
    _handlers.append(handler)
    return handler


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def agent_of(spec: WorkerSpec, **more: Any) -> RayElasticAgent:
    # Workers get all variables, and another name of a test would mean another template.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    return RayElasticAgent(spec, more.pop("logs_specs", None) or DefaultLogsSpecs(), **more)


def run(spec: WorkerSpec, **more: Any) -> RunResult:
    return agent_of(spec, **more).run()
