"""The placement group of a session: one bundle per host, holding the CPUs and GPUs."""

import asyncio
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from torchrunx_ray.driver import cluster, shape
from torchrunx_ray.driver.cluster import Node, untyped_ray
from torchrunx_ray.driver.loop import in_thread
from torchrunx_ray.driver.options import Options
from torchrunx_ray.driver.shape import HostWanted
from torchrunx_ray.errors import PlacementError

logger = logging.getLogger("torchrunx_ray")

_VERDICT_S = 0.05
"""After this Ray has decided whether the group is possible at all."""
_REPORT_EVERY_S = 10
_RELEASE_S = 1.0
"""What a removed group held is known to be free by then; Ray's nodes report every 0.1 s."""

_last_release = float("-inf")


@dataclass(frozen=True)
class Host:
    """One host of a placed session."""

    node_id: str
    label: str
    workers: int
    gpus_per_worker: float
    gpu_ids: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Room that is held until `remove`."""

    hosts: list[Host]
    _group: PlacementGroup

    async def remove(self) -> None:
        global _last_release
        await in_thread(remove_placement_group, self._group)
        _last_release = time.monotonic()


async def place(options: Options, name: str) -> Placement:
    """Reserve room for the launch; PlacementError where there is none in time."""
    nodes = await in_thread(cluster.live_nodes)
    driver_node_id: str = cluster.context().get_node_id()
    wanted = shape.resolve(options, nodes, driver_node_id)
    await _see_own_release(wanted, nodes)
    group = await in_thread(_create_group, options, wanted, name)
    try:
        await _wait_for(group, options, wanted)
        hosts = await _hosts_of(group, wanted)
    except BaseException:
        remove_placement_group(group)
        raise
    return Placement(hosts, group)


def _create_group(options: Options, wanted: Sequence[HostWanted], name: str) -> PlacementGroup:
    pins = [{"ray.io/node-id": host.node.node_id} if host.node else {} for host in wanted]
    return placement_group(
        [host.bundle for host in wanted],
        strategy=options.placement_strategy,
        name=name,
        bundle_label_selector=pins,
    )


def _table(group: PlacementGroup) -> dict[str, Any]:
    return untyped_ray.util.placement_group_table(group)


async def _see_own_release(wanted: Sequence[HostWanted], nodes: Sequence[Node]) -> None:
    """Wait until Ray's head knows what we released a moment ago, if it is needed and enough.

    A group that finds it missing is tried again only after a second. There is no event to wait
    on: the nodes report to the head every 0.1 s.
    """
    needed: Counter[str] = Counter()
    for host in wanted:
        needed.update(host.bundle)
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node.resources)
    if any(total[name] < amount for name, amount in needed.items()):
        return
    while time.monotonic() - _last_release < _RELEASE_S:
        free = await in_thread(cluster.free_resources)
        if all(free.get(name, 0) >= amount for name, amount in needed.items()):
            return
        await asyncio.sleep(0.01)


async def _wait_for(group: PlacementGroup, options: Options, wanted: Sequence[HostWanted]) -> None:
    limit = math.inf if options.placement_timeout is None else options.placement_timeout
    begun = time.monotonic()
    waiting: asyncio.Task[bool] | None = None
    for pause_s in itertools.chain([_VERDICT_S], itertools.repeat(_REPORT_EVERY_S)):
        waiting = waiting or asyncio.create_task(in_thread(group.wait, _REPORT_EVERY_S))
        left_s = begun + limit - time.monotonic()
        if await _is_ready(waiting, min(pause_s, left_s)):
            return
        if waiting.done():
            waiting = None
        table = await in_thread(_table, group)
        if table["stats"]["scheduling_state"] == "INFEASIBLE":
            await _raise_no_room("No node, or too few, could ever hold", wanted)
        waited_s = time.monotonic() - begun
        if waited_s >= limit:
            await _raise_no_room(
                f"After placement_timeout={limit:g} s there is no room for", wanted
            )
        logger.info("waiting for room in the Ray cluster since %.0f s", waited_s)


async def _is_ready(waiting: "asyncio.Task[bool]", timeout_s: float) -> bool:
    await asyncio.wait({waiting}, timeout=timeout_s)
    return waiting.done() and waiting.result()


async def _raise_no_room(problem: str, wanted: Sequence[HostWanted]) -> None:
    nodes = await in_thread(cluster.live_nodes)
    raise PlacementError(
        f"{problem} the launch's {len(wanted)} hosts.",
        wanted=[host.bundle for host in wanted],
        available={node.hostname: node.resources for node in nodes},
        advice="Ask for fewer workers or hosts, or for less per worker.",
    )


async def _hosts_of(group: PlacementGroup, wanted: Sequence[HostWanted]) -> list[Host]:
    table = await in_thread(_table, group)
    node_ids: list[str] = [table["bundles_to_node_id"][i] for i in range(len(wanted))]
    nodes = {node.node_id: node for node in await in_thread(cluster.live_nodes)}
    gpu_ids = await asyncio.gather(
        *(_gpu_ids(group, i, host.bundle.get("GPU", 0)) for i, host in enumerate(wanted))
    )
    hostnames = _labels([(nodes[n].hostname, nodes[n].ip) for n in node_ids])
    return [
        Host(node_id, host.label or hostname, host.workers, host.gpus_per_worker, ids)
        for node_id, host, hostname, ids in zip(node_ids, wanted, hostnames, gpu_ids, strict=True)
    ]


def _labels(hosts: Sequence[tuple[str, str]]) -> list[str]:
    """Hostnames where these are distinct, else IPs, else IPs with an index."""
    names = [name for name, _ in hosts]
    ips = [ip for _, ip in hosts]
    if len(set(names)) == len(names):
        return names
    if len(set(ips)) == len(ips):
        return ips
    return [f"{ip}#{ips[:i].count(ip)}" for i, ip in enumerate(ips)]


async def _gpu_ids(group: PlacementGroup, index: int, amount: float) -> tuple[str, ...]:
    """The ids of a bundle's GPUs: they are the bundle's for as long as it lives."""
    if not amount:
        return ()
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    ask: Any = untyped_ray.remote(num_cpus=0, num_gpus=amount, scheduling_strategy=strategy)(
        _own_gpu_ids
    )
    ids: list[str] = await ask.remote()
    return tuple(sorted(ids, key=lambda i: (not i.isdigit(), int(i) if i.isdigit() else 0, i)))


def _own_gpu_ids() -> list[str]:
    return cluster.context().get_accelerator_ids()["GPU"]
