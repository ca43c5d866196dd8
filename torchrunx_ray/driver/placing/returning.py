"""Nodes that left the cluster recently and may soon return, such as a restarting pod."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence

from torchrunx_ray.driver.background.loop import in_thread
from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import reminders
from torchrunx_ray.driver.placing.plan import Plan, resolve
from torchrunx_ray.driver.placing.reminders import For
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.errors import PlacementError

logger = logging.getLogger("torchrunx_ray")

WAIT_S = 60.0
"""Time after a node left during which its return is awaited. Kubernetes restarts a pod in 20 s."""

_LOOK_S = 1.0

_NODES_SHOWN = 4


async def nodes_that_left(connection: Connection) -> list[Node]:
    """Return the nodes that may soon return, with their former resources."""
    try:
        left = await connection.call(connection.inside, inventory.left_nodes)
    except ClusterLeft:
        raise
    except Exception as error:  # the call is not public, and the head may be slow
        logger.debug("Ray did not say which nodes left the cluster", exc_info=error)
        return []
    # The head's clock may differ from this one.
    return [node for node in left if node.left_s is not None and abs(node.left_s) < WAIT_S]


def in_words(left: Sequence[Node]) -> str:
    """Return a text that names the awaited nodes, and how long they are awaited."""
    names = [f"{node.name} left the cluster {max(0, node.left_s or 0):.0f} s ago" for node in left]
    shown = ", ".join([*names[:_NODES_SHOWN], *(["..."] if names[_NODES_SHOWN:] else [])])
    return (
        f"{shown}. The launch waits for such a node until the node has been away for {WAIT_S:.0f} s"
    )


async def resolve_when_back(
    options: Options, progress: Progress, connection: Connection, begun: float
) -> tuple[Plan, list[Node]]:
    """Return the launch's plan, and the live nodes.

    Waits if only nodes that left a moment ago are missing.
    """
    limit_s = math.inf if options.placement_timeout is None else options.placement_timeout
    awaited: list[Node] = []
    while True:
        nodes, here = await connection.call(_nodes_and_ours)
        try:
            return await _resolve(options, nodes, here), nodes
        except (PlacementError, ValueError) as error:
            left = await nodes_that_left(connection)
            now, _ = await connection.call(_nodes_and_ours)
            if {node.node_id for node in now} != {node.node_id for node in nodes}:
                continue  # for example, a node returned between the two questions
            is_over = time.monotonic() - begun >= limit_s
            if is_over or not left or not await _would_do(options, [*nodes, *left], here):
                if awaited:
                    error.add_note(f"The launch waited for the return of {_names(awaited)}.")
                raise
        awaited = left
        progress.waiting_for = f"after the return of {_names(left)}"
        if reminders.is_due(progress.name, For.RETURN):
            others = reminders.others_than(progress.name)
            logger.warning("%s is waiting: %s%s", progress.name, in_words(left), others)
        await asyncio.sleep(_LOOK_S)


async def _would_do(options: Options, nodes: Sequence[Node], here: str) -> bool:
    try:
        await _resolve(options, nodes, here)
    except (PlacementError, ValueError):
        return False
    return True


async def _resolve(options: Options, nodes: Sequence[Node], here: str) -> Plan:
    if options.hostnames == "slurm":  # asks Slurm and a name server, which may block
        return await in_thread(resolve, options, nodes, here)
    return resolve(options, nodes, here)


def _nodes_and_ours() -> tuple[list[Node], str]:
    return inventory.live_nodes(), inventory.context().get_node_id()


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(node.name for node in nodes[:_NODES_SHOWN])
