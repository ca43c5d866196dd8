"""Whether the cluster has room for a placement group, now or ever, and waiting for it."""

import asyncio
import itertools
import logging
import math
import time
from typing import Any

from ray.util.placement_group import PlacementGroup

from torchrunx_ray.driver import cluster
from torchrunx_ray.driver.cluster import Connection, untyped_ray
from torchrunx_ray.driver.fit import why_impossible
from torchrunx_ray.driver.loop import in_thread
from torchrunx_ray.driver.shape import Shape
from torchrunx_ray.errors import PlacementError, room_table

logger = logging.getLogger("torchrunx_ray")

_VERDICT_S = 0.05
"""After this Ray has decided whether the group is possible at all."""

_REPORT_EVERY_S = 10
"""Also how long one question to Ray waits, which takes whole seconds."""


async def wait_for_room(
    group: PlacementGroup, timeout_s: float | None, shape: Shape, connection: Connection
) -> None:
    """Return when the group is placed; PlacementError when it cannot be, or is not in time."""
    limit_s = math.inf if timeout_s is None else timeout_s
    begun = time.monotonic()
    asking: asyncio.Task[bool] | None = None
    for pause_s in itertools.chain([_VERDICT_S], itertools.repeat(_REPORT_EVERY_S)):
        asking = asking or asyncio.create_task(in_thread(group.wait, _REPORT_EVERY_S))
        left_s = max(_VERDICT_S, begun + limit_s - time.monotonic())
        try:
            if await _is_ready(asking, min(pause_s, left_s)):
                return
        except Exception as error:  # Ray has no type for it
            connection.check()
            raise PlacementError(
                f"Somebody else removed the launch's placement group while it waited: {error}"
            ) from None
        finally:
            # The group may be removed while Ray is still asked about it.
            asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        if asking.done():
            asking = None
        connection.check()
        await _report(group, shape, time.monotonic() - begun, limit_s)


async def _is_ready(asking: "asyncio.Task[bool]", timeout_s: float) -> bool:
    await asyncio.wait({asking}, timeout=timeout_s)
    return asking.done() and asking.result()


async def _report(group: PlacementGroup, shape: Shape, waited_s: float, limit_s: float) -> None:
    """Say what the launch waits for, or raise where that has no end."""
    table: dict[str, Any] = await in_thread(untyped_ray.util.placement_group_table, group)
    nodes = await in_thread(cluster.live_nodes)
    free_by_node = await in_thread(cluster.free_by_node)
    free = {node.name: free_by_node[node.node_id] for node in nodes if node.node_id in free_by_node}
    total = {node.name: node.resources for node in nodes}
    wanted = [host.bundle for host in shape.hosts]
    impossible = why_impossible(wanted, nodes)
    if impossible is None and table["stats"]["scheduling_state"] == "INFEASIBLE":
        impossible = "Ray finds no way to place the hosts as placement_strategy and labels ask"
    if impossible is not None:
        raise PlacementError(
            f"The Ray cluster can never hold this launch: {impossible}.",
            wanted=wanted,
            free=free,
            total=total,
            advice="Ask for fewer hosts or workers, or for less per worker.",
        )
    if waited_s >= limit_s:
        raise PlacementError(
            f"The Ray cluster had no room for this launch within placement_timeout={limit_s:g} s.",
            wanted=wanted,
            free=free,
            total=total,
            advice="Others hold what is missing. Wait longer, or ask for less.",
        )
    logger.warning(
        "waiting for room in the Ray cluster, %.0f s so far\n%s",
        waited_s,
        room_table(wanted, free, total),
    )
