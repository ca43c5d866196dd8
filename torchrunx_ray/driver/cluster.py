"""The nodes of the Ray cluster that this driver belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrunx_ray.driver.connection import Connection, is_remote_client, untyped_ray


@dataclass(frozen=True)
class Node:
    """A live node of the cluster, and what it has in all."""

    node_id: str
    hostname: str
    ip: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        """For people; several nodes of one machine share hostname and IP."""
        return f"{self.hostname} ({self.ip}, {self.node_id[:8]})"

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0)

    @property
    def store_size(self) -> float:
        """Of its object store, in bytes."""
        return self.resources.get("object_store_memory", 0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0)


def is_here(node_id: str) -> bool:
    """Whether this process runs on that node."""
    return not is_remote_client() and context().get_node_id() == node_id


def was_started_here() -> bool:
    """Whether ray.init() started this cluster, which is this machine then."""
    if is_remote_client():
        return False
    node = untyped_ray._private.worker.global_worker.node
    return node is not None and node.is_head()


def live_nodes() -> list[Node]:
    nodes: list[dict[str, Any]] = untyped_ray.nodes()
    return [
        Node(
            node_id=node["NodeID"],
            hostname=node["NodeManagerHostname"],
            ip=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node.get("Labels") or {},
        )
        for node in nodes
        if node["Alive"]
    ]


def free_resources() -> dict[str, float]:
    """What the whole cluster has free, as Ray's head knows it."""
    return untyped_ray.available_resources()


def free_by_node() -> dict[str, dict[str, float]]:
    """What each node has free, by node id."""
    return Connection().inside(_free_by_node)


def _free_by_node() -> dict[str, dict[str, float]]:
    # No public function tells it without the dashboard.
    return untyped_ray._private.state.available_resources_per_node()


def context() -> Any:
    return untyped_ray.get_runtime_context()
