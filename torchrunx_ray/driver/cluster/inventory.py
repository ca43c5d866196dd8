"""The nodes of the Ray cluster that this driver belongs to."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray._raylet

from torchrunx_ray.driver.cluster.connection import (
    is_remote_client,
    untyped_ray,
    was_begun_by_launch,
)

_raylet: Any = ray._raylet  # Cython, without types

_CONNECT_S = 1.0
"""Time for a connection to a raylet. A host that is cut off does not answer."""

_SPEAK_S = 2.0
"""Time for a raylet to speak on a connection. A frozen raylet never does."""

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes of a client of HTTP/2, which gRPC speaks: its preface, and empty settings."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, with its total resources."""

    node_id: str
    hostname: str
    ip: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    port: int = 0
    """Port of the raylet, Ray's process for the node."""
    left_s: float | None = None
    """Seconds since the node left the cluster; None while the node is in the cluster."""

    @property
    def name(self) -> str:
        """Name for messages. Several nodes of one machine share hostname and IP."""
        return f"{self.hostname} ({self.ip}, {self.node_id[:8]})"

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0)

    @property
    def store_size(self) -> float:
        """Size of the node's object store, in bytes."""
        return self.resources.get("object_store_memory", 0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0)


def is_here(node_id: str) -> bool:
    """Return True if this process runs on that node."""
    return not is_remote_client() and context().get_node_id() == node_id


def was_started_here() -> bool:
    """Return True if ray.init() in this process started the cluster, whose head is then this machine."""
    if is_remote_client():
        return False
    node = untyped_ray._private.worker.global_worker.node
    return node is not None and node.is_head()


def other_hosts() -> str:
    """Return advice how to get more hosts if the launch itself started this Ray, else ""."""
    if not (was_started_here() and was_begun_by_launch()):
        return ""
    why = (
        "because RAY_ADDRESS=local is set"
        if os.environ.get("RAY_ADDRESS") == "local"
        else "because it found no Ray to join"
    )
    return (
        f"The launch itself started this Ray, {why}. Set RAY_ADDRESS=<head>:6379, or run the script on a node "
        'of the cluster. To try several hosts on one machine: hostnames=2, placement_strategy="PACK".'
    )


def live_nodes() -> list[Node]:
    nodes: list[dict[str, Any]] = untyped_ray.nodes()
    return [
        Node(
            node_id=node["NodeID"],
            hostname=node["NodeManagerHostname"],
            ip=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node.get("Labels") or {},
            port=node["NodeManagerPort"],
        )
        for node in nodes
        if node["Alive"]
    ]


def left_nodes() -> list[Node]:
    """Return the nodes that left the cluster and are not back, if Ray's head still knows them.

    Called inside the cluster, like `free_by_node`.
    """
    # Ray's public table has neither the time at which a node left nor its resources.
    gcs = _raylet.GcsClient(address=context().gcs_address)
    infos = list(gcs.get_all_node_info(timeout=5).values())
    return [
        Node(
            node_id=info.node_id.hex(),
            hostname=info.node_manager_hostname,
            ip=info.node_manager_address,
            resources=dict(info.resources_total),
            labels=dict(info.labels),
            left_s=time.time() - info.end_time_ms / 1000,
        )
        for info in _not_back(infos)
    ]


def _not_back(infos: Sequence[Any]) -> list[Any]:
    """Return the nodes that left, without those that a later node of the same host has replaced."""
    came = sorted(infos, key=lambda info: info.start_time_ms)
    away: list[Any] = []
    for left in sorted(filter(_when_it_left, infos), key=_when_it_left):
        host = left.node_manager_hostname, left.node_manager_address
        for later in came:
            is_there = (later.node_manager_hostname, later.node_manager_address) == host
            if is_there and later.start_time_ms >= left.end_time_ms:
                came.remove(later)
                break
        else:
            away.append(left)
    return away


def _when_it_left(info: Any) -> int:
    return info.end_time_ms


def answers(node: Node) -> bool:
    """Return True if the raylet speaks on a connection. Ray itself reports a dead or frozen raylet 15 to 60 s later.

    The kernel accepts connections also for a frozen process. Called inside the cluster, like `free_by_node`. This may
    block for _CONNECT_S and _SPEAK_S.
    """
    try:
        with socket.create_connection((node.ip, node.port), _CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false", ""):
                return True  # a server with TLS waits for another hello
            connection.settimeout(_SPEAK_S)
            connection.sendall(_HELLO)
            return bool(connection.recv(1))
    except OSError:
        return False


def free_by_node() -> dict[str, dict[str, float]]:
    """Return the free resources of each node, by node id."""
    # Ray has no public function for this that works without the dashboard.
    return untyped_ray._private.state.available_resources_per_node()


def context() -> Any:
    return untyped_ray.get_runtime_context()
