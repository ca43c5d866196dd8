"""Times from the loss of a host, or from its arrival, until a run goes on. Part of `restarts.py`.

Several raylets on one machine stand for hosts. 4 workers run on one host, or 2 on each of two hosts. Times are in
seconds until the function's first line on all workers of the next attempt. A node has arrived when Ray lists it.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from functions import wait_for_change
from notes import pid_above, until_noted
from ray.cluster_utils import Cluster

import torchrunx_ray as trx

AGENT_WITH_SPARE = "SIGKILL of the agent, with a spare: first line"
AGENT = "SIGKILL of the agent, room elsewhere: first line"
RAYLET = "SIGKILL of a raylet at (1, 2): first line on the other host"
JOINED = "a node joins at (1, 2): first line on both hosts"

TARGETS = {AGENT_WITH_SPARE: 0.8, AGENT: 3.0, RAYLET: 1.0, JOINED: 3.0}

PATIENCE_S = 60
_FREE_S = 60


def measure(samples: int) -> dict[str, list[float]]:
    """Measure each question in turn, on a cluster that is whole again for each."""
    times: dict[str, list[float]] = {}
    one = trx.Launcher(workers_per_host=4, cpus_per_worker=1, max_restarts=3, hostnames=1)
    spared = trx.Launcher(
        workers_per_host=4, cpus_per_worker=1, max_restarts=3, hostnames=1, spares=1
    )
    elastic = trx.Launcher(
        workers_per_host=2, cpus_per_worker=2, hostnames=(1, 2), resize_interval=0
    )
    with _cluster() as cluster:
        for _ in range(samples):
            _make_whole(cluster, 2)
            times.setdefault(AGENT, []).append(after_kill(one, "agent", 4, 4))
            _make_whole(cluster, 2)
            times.setdefault(AGENT_WITH_SPARE, []).append(after_kill(spared, "agent", 4, 4))
            _make_whole(cluster, 2)
            times.setdefault(RAYLET, []).append(after_kill(elastic, "raylet", 4, 2))
            _make_whole(cluster, 1)
            times.setdefault(JOINED, []).append(after_arrival(elastic, cluster))
    return times


def after_kill(launcher: trx.Launcher, victim: str, size: int, size_after: int) -> float:
    """Kill what is above the last rank. Return the time until `size_after` ranks run again."""
    with tempfile.TemporaryDirectory() as folder:
        run = launcher.submit(wait_for_change, folder)
        until_noted(folder, "begun", [0], size, PATIENCE_S)
        while launcher.spares > len(list(run.spares)):
            time.sleep(0.01)
        time.sleep(2)  # for what the start has left to do
        worker = int(Path(folder, f"begun 0 {size - 1}").read_text().split()[1])
        killed_at = time.time()
        os.kill(pid_above(worker, victim), signal.SIGKILL)
        took_s = until_noted(folder, "begun", [1, 2], size_after, PATIENCE_S) - killed_at
        Path(folder, "return").touch()
        run.result()
        return took_s


def after_arrival(launcher: trx.Launcher, cluster: Cluster) -> float:
    """Add a node to the one that runs. Return the time until the ranks of both run."""
    with tempfile.TemporaryDirectory() as folder:
        run = launcher.submit(wait_for_change, folder)
        until_noted(folder, "begun", [0], 2, PATIENCE_S)
        time.sleep(2)
        cluster.add_node(num_cpus=4, wait=False)
        while len(_nodes()) < 2:
            time.sleep(0.01)
        arrived_at = time.time()
        took_s = until_noted(folder, "begun", [1, 2], 4, PATIENCE_S) - arrived_at
        Path(folder, "return").touch()
        run.result()
        return took_s


@contextmanager
def _cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)
    ray.init(cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _make_whole(cluster: Cluster, size: int) -> None:
    """Let as many nodes as that have room for workers, all of it free."""
    for node in list(cluster.worker_nodes):
        process = node.all_processes["raylet"][0].process
        if process.poll() is not None or len(cluster.worker_nodes) > size:
            cluster.remove_node(node, allow_graceful=False)
    while len(cluster.worker_nodes) < size:
        cluster.add_node(num_cpus=4)
    deadline = time.monotonic() + _FREE_S
    while len(_nodes()) != size or ray.available_resources().get("CPU") != 4.0 * size:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{ray.available_resources()} of {size} nodes")
        time.sleep(0.05)


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
