"""Several raylets on one machine, with one address."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.cluster_utils import Cluster

_OF_HEAD = {"include_dashboard": False, "include_log_monitor": False}
"""Nothing here is said through Ray: its log monitor would cost 0.5 s of CPU."""


@contextlib.contextmanager
def raylets(*nodes: dict[str, Any]) -> Iterator[Cluster]:
    """Several raylets on this machine's address, instead of the shared cluster; the head first."""
    shared = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
    ray.shutdown()
    cluster = Cluster()
    for i, node in enumerate(nodes):
        cluster.add_node(**node, **(_OF_HEAD if i == 0 else {}))
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        started = [
            process.process
            for node in cluster.list_all_nodes()
            for processes in node.all_processes.values()
            for process in processes
        ]
        cluster.shutdown()
        for process in started:  # or Python warns of each that still ran when it was forgotten
            process.wait(30)
        if shared:
            ray.init(address=shared, log_to_driver=False)
