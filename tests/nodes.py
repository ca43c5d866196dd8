"""Nodes of a cluster that die, drain and join."""

import subprocess
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.processes import command_line, wait_until

SOON_DEAD = {"health_check_period_ms": 1000, "health_check_initial_delay_ms": 1000}
"""Settings of a head that takes a silent node for dead after 6 s; by default that takes 15 s."""


def ids() -> list[str]:
    """Ids of the nodes on which workers have room."""
    return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]


def living(head: Cluster) -> int:
    """Number of nodes whose raylet lives, whether Ray knows it or not."""
    raylets_of = [node.all_processes["raylet"][0].process for node in head.worker_nodes]
    return sum(process.poll() is None for process in raylets_of)


def all_is_free(head: Cluster, cpus_of_node: int = 2) -> bool:
    """Wait until Ray knows which nodes have died, and all CPUs of the others are free."""
    return wait_until(lambda: len(ids()) == living(head), 30) and wait_until(
        lambda: ray.available_resources().get("CPU", 0) == cpus_of_node * len(ids()), 30
    )


def groups(*states: str) -> list[dict[str, Any]]:
    """Placement groups in these states."""
    return [g for g in ray.util.placement_group_table().values() if g["state"] in states]


def node_of(raylet: int) -> str:
    (node_id,) = (
        word[len("--node_id=") :]
        for word in command_line(raylet).split()
        if word.startswith("--node_id=")
    )
    return node_id


def raylet_pid(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def drain(node_id: str, within_s: int) -> None:
    address = ray.get_runtime_context().gcs_address
    options = ["--address", address, "--node-id", node_id, "--reason-message", "a test"]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *options, *reason]
    subprocess.run([*command, "--deadline-remaining-seconds", str(within_s)], check=True)
