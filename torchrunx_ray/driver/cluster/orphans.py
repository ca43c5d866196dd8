"""Placement groups whose launch is gone.

Ray removes the placement groups of a driver or an actor that has ended, but not those of a killed task.
These would hold their CPUs and GPUs until the job ends, and would block the task's own retry.
"""

import logging
from typing import Any

import ray._private.state as ray_state
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group

from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.clean_up import in_background
from torchrunx_ray.driver.cluster.connection import Connection, is_in_rays_worker, untyped_ray

logger = logging.getLogger("torchrunx_ray")

_SHORT = 12
"""Number of characters that identify one of Ray's ids."""


def group_name(name: str) -> str:
    """Return the name of a placement group. Inside a Ray task or actor the name includes the process."""
    if not is_in_rays_worker():
        return name
    context = inventory.context()
    return f"{name}@{context.get_node_id()[:_SHORT]}.{context.get_worker_id()[:_SHORT]}"


def sweep() -> None:
    """Begin to remove the groups of launches whose process has died, on any node."""
    connection = Connection()
    sweeping = connection.call(connection.inside, _sweep)
    in_background(sweeping, "could not look for placement groups of dead launches: %s")


def _sweep() -> None:
    groups: dict[str, Any] = untyped_ray.util.placement_group_table()
    owned = {
        group_id: group["name"]
        for group_id, group in groups.items()
        if "@" in group["name"] and group["state"] != "REMOVED"
    }
    if not owned:
        return
    state: Any = ray_state  # Ray's public list of workers needs the dashboard
    workers = {worker[:_SHORT] for worker in state.workers()}
    nodes = {node.node_id[:_SHORT] for node in inventory.live_nodes()}
    for group_id, name in owned.items():
        node, _, worker = name.rpartition("@")[2].partition(".")
        if len(node) == len(worker) == _SHORT and not (node in nodes and worker in workers):
            # Removed by id: a lookup by name works only in the namespace of the group's job.
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))
            logger.info("removed the placement group of a launch whose process has died: %s", name)
