"""The placement group of a session: one bundle per host, holding the CPUs and GPUs."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup

from torchrunx_ray.driver.cluster import inventory, orphans
from torchrunx_ray.driver.cluster.clean_up import clean_up
from torchrunx_ray.driver.cluster.connection import Connection, untyped_ray
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import placement_group, queue, reminders
from torchrunx_ray.driver.placing.gpu_question import GpuQuestion
from torchrunx_ray.driver.placing.plan import Host, Plan
from torchrunx_ray.driver.placing.returning import resolve_when_back
from torchrunx_ray.driver.placing.shortage import HostLeft
from torchrunx_ray.driver.placing.waiting import Waiting
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.errors import PlacementError, counted

logger = logging.getLogger("torchrunx_ray")

_said: set[str] = set()
"""Warnings that this driver has logged."""

_HEAD_S = 5.0
"""Time beyond `placement_timeout` that a launch waits for an answer from Ray's head."""


class Placement:
    """Resources that are reserved until `remove`."""

    def __init__(
        self, hosts: list[Host], plan: Plan, group: PlacementGroup, options: Options
    ) -> None:
        self.hosts = hosts
        self.backend = plan.backend
        self._group = group
        self._cluster = Connection()
        queue.hold(group, plan.needed)
        # Asked while agents start, since Ray has to start a process for the answer.
        wanted = [(host.label, float(host.bundle.get("GPU", 0))) for host in hosts]
        self._gpu_question = GpuQuestion(group, wanted, options.runtime_env)

    @property
    def held(self) -> list[Host]:
        """Hosts whose resources are held; none after the driver has left the cluster, which frees them."""
        return self.hosts if self._cluster.is_ours() else []

    async def gpu_ids(self) -> list[tuple[str, ...]]:
        """Return the GPUs of each host's bundle. Raises AgentFailedError if Ray cannot answer."""
        return await self._gpu_question.answer()

    async def is_whole(self) -> bool:
        """Return True if, as far as Ray knows, all nodes of the placement live."""
        live = {node.node_id for node in await self._cluster.call(inventory.live_nodes)}
        return all(host.node.node_id in live for host in self.hosts)

    async def check(self) -> None:
        """Raise PlacementError if somebody else has removed the placement group."""
        table: dict[str, Any] = await self._cluster.call(
            untyped_ray.util.placement_group_table, self._group
        )
        if table.get("state", "REMOVED") == "REMOVED":
            raise PlacementError(
                "the placement group of the session was removed, by ray.util.remove_placement_group or "
                "by a restart of Ray's head. Others may hold its resources now. Open a new session."
            )

    async def remove(self) -> None:
        """Give the resources back. Errors are logged."""
        self._gpu_question.drop()
        hosts = ", ".join(host.label for host in self.hosts)
        removing = placement_group.remove(self._group, self._cluster)
        await clean_up(
            removing, f"removing the placement group that holds CPUs and GPUs of {hosts}"
        )


async def reserve(options: Options, progress: Progress) -> Placement:
    """Reserve room for the launch. Raises PlacementError if there is none in time."""
    limit_s = options.placement_timeout
    limit = asyncio.timeout(None if limit_s is None else limit_s + _HEAD_S)
    try:
        async with limit:
            return await _place_on_hosts_that_stay(options, progress)
    except TimeoutError:
        if not limit.expired():
            raise
        head = "Ray's head has not answered"
        if options.hostnames == "slurm":
            head = 'Ray\'s head, or with hostnames="slurm" the scontrol or name server, has not answered'
        raise PlacementError(
            f"{head}: the driver has waited for {limit_s:g} s (placement_timeout) and {_HEAD_S:g} s more. "
            "Is the head's machine frozen, overloaded or cut off? Check with `ray status` on that machine. "
            "Launch again, or use a longer placement_timeout."
        ) from None
    finally:
        reminders.forget(progress.name)
        del limit  # it refers to the task, whose exception refers to this frame


async def _place_on_hosts_that_stay(options: Options, progress: Progress) -> Placement:
    orphans.sweep()
    begun = time.monotonic()
    left: HostLeft | None = None
    while True:
        try:
            return await _place(options, progress, begun)
        except HostLeft as host:
            left = host
        except PlacementError as error:
            if left is None:
                raise
            raise left.error from error


async def _place(options: Options, progress: Progress, begun: float) -> Placement:
    """Choose hosts, and wait until they have room. Raises HostLeft if hosts must be chosen again."""
    connection = Connection()
    plan, nodes = await resolve_when_back(options, progress, connection, begun)
    waiting = Waiting(options, plan, connection, progress, time.monotonic() - begun)
    try:
        while True:
            group = await waiting.until_placed(nodes)
            hosts = await _hosts_of(group, plan, connection)
            if hosts is not None:
                break
    except BaseException:
        await clean_up(waiting.give_up(), f"removing the placement group of {progress.name}")
        raise
    placement = Placement(hosts, plan, group, options)
    with contextlib.suppress(Exception):  # a log handler may fail; the placement must be returned
        logger.info("%s: %s", progress.name, _in_words(plan, hosts, nodes))
        _say_who_shares(options, hosts)
    return placement


async def _hosts_of(group: PlacementGroup, plan: Plan, connection: Connection) -> list[Host] | None:
    """Return the hosts of the group. None if a node has died, so that Ray places the group again."""
    table: dict[str, Any] = await connection.call(untyped_ray.util.placement_group_table, group)
    node_ids: list[str] = [table["bundles_to_node_id"].get(i) for i in range(len(plan.hosts))]
    nodes = {node.node_id: node for node in await connection.call(inventory.live_nodes)}
    if not nodes.keys() >= set(node_ids):
        return None
    placed = [nodes[node_id] for node_id in node_ids]
    return [
        Host(node, host.label or label, host.workers, host.bundle, plan.gpus_per_worker)
        for node, host, label in zip(placed, plan.hosts, _labels(placed), strict=True)
    ]


def _say_who_shares(options: Options, hosts: Sequence[Host]) -> None:
    """Warn, once for each host, if workers share CPUs although cpus_per_worker is not set."""
    if options.cpus_per_worker is not None:
        return
    for host in hosts:
        cpus = int(host.node.cpus)
        if cpus and host.workers > cpus:
            said = (
                f"{host.workers} workers share {counted(cpus, 'CPU')} on {host.label}, up to "
                f"{math.ceil(host.workers / cpus)} on each CPU, so they take turns. If you want this, set "
                f"cpus_per_worker={math.floor(100 * cpus / host.workers) / 100:g}. Otherwise use fewer "
                "workers_per_host."
            )
            if said not in _said:
                _said.add(said)
                logger.warning(said)


def _labels(nodes: Sequence[Node]) -> list[str]:
    """Return the hostnames if they are distinct, else the IPs, with an index if several hosts share an IP."""
    names = [node.hostname for node in nodes]
    ips = [node.ip for node in nodes]
    if len(set(names)) == len(names):
        return names
    if len(set(ips)) == len(ips):
        return ips
    return [f"{ip}#{ips[:i].count(ip)}" if ips.count(ip) > 1 else ip for i, ip in enumerate(ips)]


def _in_words(plan: Plan, hosts: Sequence[Host], nodes: Sequence[Node]) -> str:
    """Return the launch's plan in words, for the launch's first log line."""
    workers = sum(host.workers for host in hosts)
    gpus = sum(host.bundle.get("GPU", 0) for host in hosts)
    text = (
        f"launching on {counted(len(hosts), 'host')} ({', '.join(host.label for host in hosts)}): "
        f"{counted(workers, 'worker')}, {counted(gpus, 'GPU')}, backend {plan.backend}"
    )
    used = {host.node.node_id for host in hosts}
    unused = sum(node.gpus for node in nodes if node.node_id in used) - gpus
    if unused <= 0:
        return text
    return f"{text}; {counted(unused, 'GPU')} of these hosts {'stays' if unused == 1 else 'stay'} unused"
