"""The Ray cluster that this driver belongs to."""

import asyncio
import atexit
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from torchrunx_ray.errors import LaunchError

untyped_ray: Any = ray
"""Most of Ray's functions have no types, or such that name none."""


class ClusterLeft(LaunchError):
    """The driver called ray.shutdown() while a run went on."""

    def __init__(self) -> None:
        super().__init__("the driver left the Ray cluster by ray.shutdown() before the run ended")


class Connection:
    """The driver's membership in the cluster, as of now.

    Where it has ended nothing may be asked of Ray: it would start or join another cluster.
    """

    def __init__(self) -> None:
        self._worker_id: str = context().get_worker_id()

    async def ask(self, method: Any, *args: Any) -> Any:
        """What an actor's method, or a remote function, returns.

        Ray answers nothing more once the driver has called ray.shutdown().
        """
        self.check()
        answer = asyncio.ensure_future(method.remote(*args))
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=_LOOK_AROUND_S)
                if not answer.done():
                    self.check()
            return answer.result()
        except RayError:
            self.check()  # shutdown ends the actors that were asked, too
            raise
        finally:
            answer.cancel()
            del answer  # a failure refers to this frame, and must not wait for Python's gc

    def check(self) -> None:
        if not self.is_ours():
            raise ClusterLeft

    def is_ours(self) -> bool:
        if _interpreter_ends.is_set() or not untyped_ray.is_initialized():
            return False
        return context().get_worker_id() == self._worker_id


_LOOK_AROUND_S = 1.0
"""How often a driver that waits for an answer looks whether it still belongs to the cluster."""

_connecting = threading.Lock()

# Ray's own atexit function, which was registered before, ends its worker under our thread's feet.
_interpreter_ends = threading.Event()
atexit.register(_interpreter_ends.set)


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


def connect() -> None:
    """Join the cluster that Ray finds, or start one on this machine; once per driver.

    Called in the user's own thread: Ray installs signal handlers, which only the main thread may.
    """
    with _connecting:
        if not untyped_ray.is_initialized():
            _init()


def _init() -> None:
    if sys.platform != "linux":
        raise OSError(
            f"torchrunx_ray runs workers on Linux, and this is {sys.platform}. From here you can "
            'drive a Linux cluster: call ray.init("ray://<head>:10001") before the launch.'
        )
    untyped_ray.init()


def is_remote_client() -> bool:
    """Whether this driver is connected through ray://, where Ray tells less."""
    return untyped_ray.util.client.ray.is_connected()


def was_started_here() -> bool:
    """Whether ray.init() started this cluster, which is this machine then."""
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
    """What each node has free, by node id; empty where Ray does not tell (through ray://)."""
    if is_remote_client():
        return {}
    # No public function tells it without the dashboard.
    return untyped_ray._private.state.available_resources_per_node()


def context() -> Any:
    return untyped_ray.get_runtime_context()
