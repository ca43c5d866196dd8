"""Nodes that leave and join a cluster of several raylets."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.clusters.raylets import raylets

CPUS = 2
"""CPUs of each node, all of which one host takes."""


class Nodes:
    """The nodes of a cluster that hosts can be on; the head has no room."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.living: dict[int, Any] = {}
        """The nodes, by the pid of their raylet."""

    def add(self) -> None:
        node = self._cluster.add_node(num_cpus=CPUS)
        self.living[node.all_processes["raylet"][0].process.pid] = node

    def kill(self, raylet: int) -> None:
        """End a raylet as a crash would. `forget` removes what is left of its node."""
        os.kill(raylet, signal.SIGKILL)

    def forget(self, raylet: int) -> None:
        """Remove a node from the cluster."""
        self._cluster.remove_node(self.living.pop(raylet), allow_graceful=False)

    def drain(self, raylet: int, within_s: int) -> None:
        """Announce that a node leaves, as an autoscaler does."""
        where = ["--address", self._cluster.address, "--node-id", self.living[raylet].node_id]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *where, *why]
        deadline = ["--deadline-remaining-seconds", str(within_s)]
        subprocess.run([*command, *deadline], check=True, stdout=subprocess.DEVNULL)

    def free_cpus(self) -> float:
        return ray.available_resources().get("CPU", 0)


@contextmanager
def some_nodes(count: int) -> Iterator[Nodes]:
    # By default Ray takes a silent node for dead after 15 s.
    patience = {"health_check_period_ms": 1000, "health_check_initial_delay_ms": 1000}
    with raylets({"num_cpus": 0, "_system_config": patience}) as cluster:
        nodes = Nodes(cluster)
        for _ in range(count):
            nodes.add()
        yield nodes


def raylet_of(agent: int) -> int:
    variables = Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
    (pid,) = (each[15:] for each in variables if each.startswith(b"RAY_RAYLET_PID="))
    return int(pid)
