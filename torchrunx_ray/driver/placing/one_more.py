"""Room for one more host of a launch that has hosts already."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace

from torchrunx_ray.driver.cluster import draining, inventory
from torchrunx_ray.driver.cluster.connection import Connection, untyped_ray
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import queue
from torchrunx_ray.driver.placing.feasibility import could_be_host, is_in
from torchrunx_ray.driver.placing.placement import Placement, place_at_once, reserve
from torchrunx_ray.driver.placing.plan import Host, Plan, resolve
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.errors import PlacementError

logger = logging.getLogger("torchrunx_ray")

_NODE_ID = "ray.io/node-id"
"""Ray's label for the id of a node."""

_AGAIN_S = 1.0
"""Pause before a launch asks again for room that the cluster cannot have as it is."""

_TELL_EVERY_S = 60.0
"""Interval of the warnings of a launch that waits for a node to join."""


def in_place_of(host: Host, options: Options, avoided: Collection[str]) -> Options:
    """Return options for a host in the place of another one, on none of the avoided nodes.

    A host that the user has named is awaited under this name.
    """
    workers = options.workers_per_host
    counts_by_node = isinstance(workers, str) and workers != "slurm"
    one = replace(
        options,
        workers_per_host=workers if counts_by_node else host.workers,
        gpus_per_worker=host.gpus_per_worker,
        spares=0,
        hostnames=[host.label] if options.names_its_hosts else 1,
    )
    return one if options.names_its_hosts else off(one, avoided)


def off(options: Options, avoided: Collection[str]) -> Options:
    """Return options that rule out these nodes, unless the user himself selects nodes by their ids."""
    selector = dict(options.label_selector or {})
    if not avoided or _NODE_ID in selector:
        return options
    selector[_NODE_ID] = f"!in({','.join(sorted(avoided))})"
    return replace(options, label_selector=selector)


async def reserve_when_there(
    wanted: Callable[[], Awaitable[Options]], limit_s: float | None, progress: Progress, name: str
) -> Placement:
    """Reserve room, also if the cluster has no such node now: a node may join or return.

    Raises PlacementError after `limit_s`. `wanted` returns the options of each new request, whose
    `placement_timeout` limits this one request.
    """
    begun = time.monotonic()
    ends_at = math.inf if limit_s is None else begun + limit_s
    tells_at = begun
    try:
        while True:
            options = await wanted()
            of_request_s = (
                math.inf if options.placement_timeout is None else options.placement_timeout
            )
            within_s = min(of_request_s, max(0.0, ends_at - time.monotonic()))
            timeout = None if within_s == math.inf else within_s
            try:
                return await reserve(replace(options, placement_timeout=timeout), progress, name)
            except PlacementError as error:
                now = time.monotonic()
                if now + _AGAIN_S >= ends_at:
                    raise _too_late(error, limit_s) from None
                progress.waiting_for = "no node can take a lost host's place yet"
                # A request with a limit of its own says nothing of the cluster as a whole.
                if options.placement_timeout is None and now >= tells_at:
                    tells_at = now + _TELL_EVERY_S
                    _tell_of_wait(progress.name, now - begun, limit_s, error)
            await asyncio.sleep(_AGAIN_S)
    finally:
        progress.waiting_for = ""


def _too_late(error: PlacementError, limit_s: float | None) -> PlacementError:
    """Return the error of the last request as an error of the whole wait."""
    late = PlacementError(
        f"No host could take the place of a lost one within placement_timeout={limit_s:g} s. The last request: {error}"
    )
    late.wanted, late.free, late.total = error.wanted, error.free, error.total
    return late


def _tell_of_wait(name: str, waited_s: float, limit_s: float | None, error: PlacementError) -> None:
    logger.warning(
        "%s is waiting for a node that can take the place of a lost host, %.0f s%s so far: %s",
        name,
        waited_s,
        "" if limit_s is None else f" of {limit_s:g}",
        error,
    )


async def reserve_free(
    options: Options,
    like: Host,
    held: Sequence[Host],
    avoided: Collection[str],
    name: Callable[[], str],
) -> Placement | None:
    """Reserve room for one host that is free at this moment; None if there is none, or if others wait for room.

    `like` is a host of the launch, `held` are all hosts that it has. `name` returns the name of a new placement group.
    """
    connection = Connection()
    if queue.has_waiters() or await connection.call(_others_wait):
        return None
    nodes = await connection.call(inventory.live_nodes)
    free = await connection.call(connection.inside, inventory.free_by_node)
    leaving = await draining.deadlines(connection)
    apart = {host.node.node_id for host in held if options.placement_strategy == "STRICT_SPREAD"}
    for node in sorted(nodes, key=lambda node: (-node.gpus, -node.cpus)):
        if node.node_id in {*avoided, *apart, *leaving} or not could_be_host(node, options):
            continue
        plan = _plan_on(node, like, options, nodes)
        if plan is not None and is_in(plan.needed, free.get(node.node_id, {})):
            placement = await place_at_once(options, plan, name(), connection)
            if placement is not None:
                return placement
    return None


def _plan_on(node: Node, like: Host, options: Options, nodes: Sequence[Node]) -> Plan | None:
    """Return the plan of one host on this node; None if the node has nothing to count workers by."""
    one = replace(in_place_of(like, options, ()), hostnames=[node.node_id])
    try:
        return resolve(one, nodes, node.node_id)
    except (PlacementError, ValueError):
        return None


def _others_wait() -> bool:
    """Return True if some placement group of the cluster waits for resources, or is being placed."""
    groups = untyped_ray.util.placement_group_table().values()
    return any(
        group["state"] == "PENDING" and group["stats"]["scheduling_state"] != "INFEASIBLE"
        for group in groups
    )
