"""Nodes that leave and join a cluster: hosts with addresses of their own, whose network can be cut."""

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import ray

from tests.clusters.raylets import raylets
from tests.clusters.started import ray_start
from tests.clusters.two_hosts import cut, inside, mend, network
from tests.nodes import SOON_DEAD, node_of
from tests.processes import command_line, pids, titled, wait_until

CPUS = 2
"""CPUs of each node, all of which one host takes."""

_DRIVER = "10.77.0.1"
_HOSTS = {f"trxh{i}": f"10.77.0.{10 + i}" for i in range(1, 9)}
"""Hosts, of which each serves again some time after its node is gone."""

_UNTYPED_RAYLET: Any = import_module("ray._raylet")
_UNTYPED_MESSAGES: Any = import_module("ray.core.generated.autoscaler_pb2")

_STORE_BYTES = 150 * 2**20
_OURS = ("ray::Agent", "torchrunx_ray: ")
"""How the command lines of our processes begin."""


@dataclass
class Node:
    """A host that is part of the cluster, or is about to join it."""

    host: str
    stack: ExitStack
    mended_at: float | None = None
    """Time at which the host's network goes on, or went on, after it was last cut; None if it never was."""

    @property
    def is_cut(self) -> bool:
        return self.mended_at is not None and time.time() < self.mended_at


class Nodes:
    """The nodes that hosts of a launch can be on. The head, on the driver's host, has no room."""

    def __init__(self, stack: ExitStack, gcs: str, folder: str) -> None:
        self._stack = stack
        self._gcs = gcs
        self._folder = folder
        self._idle = deque(_HOSTS)
        self.living: dict[str, Node] = {}
        """The nodes by their host."""

    def add(self) -> None:
        """Begin to start a node."""
        host = self._idle.popleft()
        arguments = [f"--address={self._gcs}", f"--node-ip-address={_HOSTS[host]}"]
        arguments += [f"--num-cpus={CPUS}", f"--object-store-memory={_STORE_BYTES}"]
        # Nodes that start at the same time in one folder choose the same names for their sockets.
        arguments += ["--include-log-monitor=false", f"--temp-dir={self._folder}/{host}"]
        stack = self._stack.enter_context(ExitStack())
        stack.enter_context(ray_start(*arguments, prefix=inside(host)))
        self.living[host] = Node(host, stack)

    def kill(self, host: str) -> None:
        """End a raylet as a crash would. `forget` removes what is left of its node."""
        os.kill(_raylet_on(host), signal.SIGKILL)

    def forget(self, host: str) -> None:
        """Remove a node from the cluster."""
        self.living.pop(host).stack.close()
        self._idle.append(host)

    def drain(self, host: str, within_s: float) -> None:
        """Announce that a node leaves, as an autoscaler does."""
        deadline_ms = int((time.time() + within_s) * 1000)
        node_id = node_of(_raylet_on(host))
        gcs = _UNTYPED_RAYLET.GcsClient(address=self._gcs)
        reason = _UNTYPED_MESSAGES.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why_not = gcs.drain_node(node_id, reason, "chaos", deadline_ms)
        assert accepted, why_not

    def cut(self, host: str, for_s: float) -> None:
        """Cut a host off from all others, for some time."""
        node = self.living[host]
        cut(host)
        node.mended_at = time.time() + for_s
        mending = threading.Timer(for_s, mend, [host])
        mending.start()
        node.stack.callback(mending.join)

    def free_cpus(self) -> float:
        return ray.available_resources().get("CPU", 0)


@contextmanager
def some_nodes(count: int) -> Iterator[Nodes]:
    with (
        network(_HOSTS, own=_DRIVER),
        raylets(
            {"num_cpus": 0, "node_ip_address": _DRIVER, "_system_config": SOON_DEAD}
        ) as cluster,
        # A longer path than this leaves no room for the name of a socket.
        tempfile.TemporaryDirectory(prefix="trx", dir="/tmp") as folder,
        ExitStack() as stack,
    ):
        nodes = Nodes(stack, str(cluster.address), folder)
        for _ in range(count):
            nodes.add()
        assert wait_until(lambda: nodes.free_cpus() == count * CPUS, 60)
        yield nodes


def host_of(pid: int) -> str:
    """Return the host that a process is on. Raises FileNotFoundError if it has ended."""
    return _hosts_by_namespace().get(_namespace(f"/proc/{pid}/ns/net"), "")


def on_hosts(title: str) -> set[int]:
    """Return the processes of all hosts whose command line begins so. The machine may have others."""
    hosts = set(_hosts_by_namespace())
    found: set[int] = set()
    for pid in titled(title):
        with contextlib.suppress(OSError):
            if _namespace(f"/proc/{pid}/ns/net") in hosts:
                found.add(pid)
    return found


def is_left(host: str) -> bool:
    """Return True if none of our processes is on a host."""
    return not any(_is_on(pid, host) for title in _OURS for pid in titled(title))


def _raylet_on(host: str) -> int:
    for pid in pids():
        with contextlib.suppress(OSError):
            if "/raylet/raylet " in command_line(pid) and _is_on(pid, host):
                return pid
    raise ProcessLookupError(host)


def _is_on(pid: int, host: str) -> bool:
    try:
        return host_of(pid) == host
    except OSError:
        return False


def _hosts_by_namespace() -> dict[int, str]:
    return {_namespace(f"/run/netns/{host}"): host for host in _HOSTS}


def _namespace(path: str) -> int:
    return os.stat(path).st_ino
