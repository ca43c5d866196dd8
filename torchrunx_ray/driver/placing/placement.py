"""A placement group: one bundle per host, holding the CPUs and GPUs."""

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
from torchrunx_ray.driver.placing.labels import labels
from torchrunx_ray.driver.placing.pinned import pin
from torchrunx_ray.driver.placing.plan import Host, Plan
from torchrunx_ray.driver.placing.returning import resolve_when_back
from torchrunx_ray.driver.placing.shortage import HostLeft
from torchrunx_ray.driver.placing.waiting import Waiting
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.errors import PlacementError, counted

logger = logging.getLogger("torchrunx_ray")

_said: set[str] = set()
"""Warnings that this driver has logged."""

_PLACED_S = 1
"""Time for Ray to place a group into room that is free, in whole seconds. It takes milliseconds."""

_HEAD_S = 5.0
"""Time beyond `placement_timeout` that a launch waits for an answer from Ray's head."""


class Placement:
    """Resources of one placement group, reserved until `remove`."""

    def __init__(self, hosts: list[Host], plan: Plan, group: PlacementGroup) -> None:
        self.hosts = hosts
        """Hosts of the bundles, in order, as Ray placed them at first."""
        self.backend = plan.backend
        self.group = group
        self._cluster = Connection()
        self._is_moving = False
        queue.hold(group, plan.needed)

    @property
    def is_held(self) -> bool:
        """False after the driver has left the cluster, which frees the resources."""
        return self._cluster.is_ours()

    async def node_ids(self) -> list[str | None]:
        """Return the node of each bundle; None while Ray looks for another node.

        Ray places the bundle of a dead node again by itself. Raises PlacementError if somebody else has removed the
        placement group.
        """
        table: dict[str, Any] = await self._cluster.call(
            untyped_ray.util.placement_group_table, self.group
        )
        if table.get("state", "REMOVED") == "REMOVED":
            raise PlacementError(
                "the placement group of the launch was removed, by ray.util.remove_placement_group or "
                "by a restart of Ray's head. Others may hold its resources now. Launch again, or open a new session."
            )
        self._is_moving = table["state"] != "CREATED"
        return [table["bundles_to_node_id"].get(i) or None for i in range(len(self.hosts))]

    async def remove(self) -> None:
        """Give the resources back. Errors are logged."""
        hosts = ", ".join(host.label for host in self.hosts)
        remove = placement_group.remove_unplaced if self._is_moving else placement_group.remove
        removing = remove(self.group, self._cluster)
        await clean_up(
            removing, f"removing the placement group that holds CPUs and GPUs of {hosts}"
        )


async def reserve(options: Options, progress: Progress, name: str) -> Placement:
    """Reserve room for the launch. Raises PlacementError if there is none in time.

    `name` is the name of the placement group in Ray.
    """
    limit_s = options.placement_timeout
    limit = asyncio.timeout(None if limit_s is None else limit_s + _HEAD_S)
    try:
        async with limit:
            return await _place_on_hosts_that_stay(options, progress, name)
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


async def _place_on_hosts_that_stay(options: Options, progress: Progress, name: str) -> Placement:
    orphans.sweep()
    begun = time.monotonic()
    left: HostLeft | None = None
    while True:
        try:
            return await _place(options, progress, name, begun)
        except HostLeft as host:
            left = host
        except PlacementError as error:
            if left is None:
                raise
            raise left.error from error


async def _place(options: Options, progress: Progress, name: str, begun: float) -> Placement:
    """Choose hosts, and wait until they have room. Raises HostLeft if hosts must be chosen again."""
    connection = Connection()
    plan, nodes = await resolve_when_back(options, progress, connection, begun)
    placement: Placement | None = None
    if _should_be_pinned(plan, options) and not queue.has_waiters():
        placement = await _place_pinned(options, plan, nodes, connection, name)
    if placement is None:
        waiting = Waiting(options, plan, connection, progress, name, time.monotonic() - begun)
        placement = await _wait_for_room(waiting, plan, nodes, connection, progress)
    with contextlib.suppress(Exception):  # a log handler may fail; the placement must be returned
        _say_who_shares(options, placement.hosts)
    return placement


async def _wait_for_room(
    waiting: Waiting,
    plan: Plan,
    nodes: Sequence[Node],
    connection: Connection,
    progress: Progress,
) -> Placement:
    try:
        while True:
            group = await waiting.until_placed(nodes)
            hosts = await hosts_of(group, plan, connection)
            if hosts is not None:
                return Placement(hosts, plan, group)
    except BaseException:
        await clean_up(waiting.give_up(), f"removing the placement group of {progress.name}")
        raise


def _should_be_pinned(plan: Plan, options: Options) -> bool:
    """Return True for hosts on any nodes, of which some may be lost while the run goes on; see `pinned`."""
    is_anywhere = all(host.node is None for host in plan.hosts)
    return options.may_restart and len(plan.hosts) > 1 and is_anywhere


async def _place_pinned(
    options: Options, plan: Plan, nodes: Sequence[Node], connection: Connection, name: str
) -> Placement | None:
    """Place the hosts where there is room now; None if there is no such room."""
    on_free_nodes = await pin(plan, options, nodes, connection)
    if on_free_nodes is None and queue.release_is_recent():
        await queue.until_head_knows(connection)
        on_free_nodes = await pin(plan, options, nodes, connection)
    if on_free_nodes is None:
        return None
    return await place_at_once(options, on_free_nodes, name, connection)


async def place_at_once(
    options: Options, plan: Plan, name: str, connection: Connection
) -> Placement | None:
    """Return the placement of hosts with fixed nodes if Ray places them at once, else None."""
    group = await placement_group.create(options, plan, orphans.group_name(name), connection)
    hosts: list[Host] | None = None
    try:
        if await connection.call(group.wait, _PLACED_S):
            hosts = await hosts_of(group, plan, connection)
    finally:
        if hosts is None:
            removing = placement_group.remove_unplaced(group, connection)
            await clean_up(removing, f"removing the placement group {name}")
    return None if hosts is None else Placement(hosts, plan, group)


async def hosts_of(group: PlacementGroup, plan: Plan, connection: Connection) -> list[Host] | None:
    """Return the hosts of the group. None if a node has died, so that Ray places the group again."""
    table: dict[str, Any] = await connection.call(untyped_ray.util.placement_group_table, group)
    node_ids: list[str] = [table["bundles_to_node_id"].get(i) for i in range(len(plan.hosts))]
    nodes = {node.node_id: node for node in await connection.call(inventory.live_nodes)}
    if not nodes.keys() >= set(node_ids):
        return None
    placed = [nodes[node_id] for node_id in node_ids]
    return [
        Host(node, host.label or label, host.workers, host.bundle, plan.gpus_per_worker)
        for node, host, label in zip(placed, plan.hosts, labels(placed), strict=True)
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


def in_words(hosts: Sequence[Host], backend: str | None, options: Options) -> str:
    """Return where a launch begins in words, for its first log line."""
    workers = sum(host.workers for host in hosts)
    gpus = sum(host.bundle.get("GPU", 0) for host in hosts)
    of_sizes = f" of {options.least_hosts} to {options.most_hosts}" if options.is_elastic else ""
    text = (
        f"launching on {counted(len(hosts), 'host')} ({', '.join(host.label for host in hosts)}){of_sizes}: "
        f"{counted(workers, 'worker')}, {counted(gpus, 'GPU')}, backend {backend}"
    )
    gpus_of_nodes = {host.node.node_id: host.node.gpus for host in hosts}
    unused = sum(gpus_of_nodes.values()) - gpus
    if unused <= 0:
        return text
    return f"{text}; {counted(unused, 'GPU')} of these hosts {'stays' if unused == 1 else 'stay'} unused"
