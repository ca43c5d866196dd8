"""The Ray cluster that this driver belongs to."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

untyped_ray: Any = ray
"""Most of Ray's functions have no types, or such that name none."""


@dataclass(frozen=True)
class Node:
    """A live node of the cluster, and what it has in all."""

    node_id: str
    hostname: str
    ip: str
    resources: Mapping[str, float]

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0)


def connect() -> None:
    """Join the cluster that Ray finds, or start one on this machine; once per driver.

    Called in the user's own thread: Ray installs signal handlers, which only the main thread may.
    """
    if untyped_ray.is_initialized():
        return
    if sys.platform != "linux":
        raise OSError(
            f"torchrunx_ray runs workers on Linux, and this is {sys.platform}. From here you can "
            'drive a Linux cluster: call ray.init("ray://<head>:10001") before the launch.'
        )
    untyped_ray.init()


def live_nodes() -> list[Node]:
    nodes: list[dict[str, Any]] = untyped_ray.nodes()
    return [
        Node(
            node_id=node["NodeID"],
            hostname=node["NodeManagerHostname"],
            ip=node["NodeManagerAddress"],
            resources=node["Resources"],
        )
        for node in nodes
        if node["Alive"]
    ]


def free_resources() -> dict[str, float]:
    """What the whole cluster has free, as Ray's head knows it."""
    return untyped_ray.available_resources()


def context() -> Any:
    return untyped_ray.get_runtime_context()
