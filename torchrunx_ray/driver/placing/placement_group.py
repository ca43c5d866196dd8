"""Creation and removal of Ray's placement groups, so that neither groups nor their resources are leaked."""

import asyncio
import time
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.driver.cluster.clean_up import clean_up
from torchrunx_ray.driver.cluster.connection import Connection, untyped_ray
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import queue
from torchrunx_ray.driver.placing.plan import Plan

_SETTLED_S = 2.0
"""Limit of the wait for Ray's decision on a group. Ray decides in milliseconds, unless a node is stuck."""

UNDECIDED = ("QUEUED", "SCHEDULING_STARTED")
"""Scheduling states of a group for which Ray has not yet decided if there is room."""

_STIR_S = 0.02
"""Time after a request for a group during which Ray may also try other waiting groups."""

_last_asked = float("-inf")

_at_ray = asyncio.Lock()
"""Held while a group is requested, or a waiting group is removed."""


async def create(options: Options, plan: Plan, name: str, connection: Connection) -> PlacementGroup:
    """Request a placement group with one bundle per host. The caller must remove the group."""
    global _last_asked
    labels = dict(options.label_selector or {})
    nodes = [host.node for host in plan.hosts]
    selectors = [labels | ({"ray.io/node-id": node.node_id} if node else {}) for node in nodes]
    async with _at_ray:
        creating = connection.call(
            placement_group,
            [host.bundle for host in plan.hosts],
            strategy=options.placement_strategy,
            name=name,
            bundle_label_selector=selectors,
        )
        making = asyncio.create_task(creating)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:  # Ray creates the group anyway
            removing = _remove_once_made(making, connection)
            await clean_up(removing, f"removing the placement group {name}")
            raise
        finally:
            _last_asked = time.monotonic()


async def _remove_once_made(making: "asyncio.Task[PlacementGroup]", connection: Connection) -> None:
    await asyncio.wait({making})
    if making.exception() is None:
        await _remove_settled(making.result(), connection)


async def remove(group: PlacementGroup, connection: Connection) -> None:
    """Remove a placed group, and free its resources."""
    try:
        await connection.call(remove_placement_group, group)
    finally:
        queue.release(group)


async def remove_unplaced(group: PlacementGroup, connection: Connection) -> None:
    """Remove a group that Ray may be placing at this moment.

    This waits until Ray has decided on the group. If a group is removed while Ray reserves its resources, Ray
    leaks these CPUs and GPUs for the life of the node (seen with Ray 2.60 in 1 of 60 removals).
    """
    async with _at_ray:
        await asyncio.sleep(_stirred_for_s())
        await _remove_settled(group, connection)


async def _remove_settled(group: PlacementGroup, connection: Connection) -> None:
    deadline = time.monotonic() + _SETTLED_S
    while time.monotonic() < deadline:
        if await connection.call(scheduling_state, group) not in UNDECIDED:
            break
        await asyncio.sleep(0.001)  # Ray has no event for this
    await remove(group, connection)


async def withdraw(group: PlacementGroup, connection: Connection) -> bool:
    """Remove a waiting group, to request it again. Returns False if Ray may be placing the group, or has.

    This first waits until Ray no longer tries groups because of this driver's requests; see `remove_unplaced`.
    """
    async with _at_ray:
        await asyncio.sleep(_stirred_for_s())
        removing = asyncio.create_task(connection.call(_remove_if_refused, group))
        try:
            return await asyncio.shield(removing)
        except asyncio.CancelledError:
            await clean_up(asyncio.wait({removing}), "removing a waiting placement group")
            raise


def _remove_if_refused(group: PlacementGroup) -> bool:
    if scheduling_state(group) != "NO_RESOURCES":
        return False
    remove_placement_group(group)
    return True


def scheduling_state(group: PlacementGroup) -> str:
    """Return Ray's scheduling state of the group. "REMOVED" also for an unknown group, as after a head's restart."""
    table: dict[str, Any] = untyped_ray.util.placement_group_table(group)
    return table["stats"]["scheduling_state"] if table else "REMOVED"


def _stirred_for_s() -> float:
    return max(0.0, _last_asked + _STIR_S - time.monotonic())


def _forget() -> object:
    """Reset the state in a forked child, which has none of its parent's launches. Return what was inherited."""
    global _last_asked, _at_ray
    inherited = _at_ray
    _last_asked, _at_ray = float("-inf"), asyncio.Lock()
    return inherited


in_child(_forget)
