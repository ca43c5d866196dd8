"""Ray's placement groups: made and removed so that none is left, nor what one of them held."""

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
"""Ray places a group, or finds that it cannot, in some milliseconds, unless a node is stuck."""

UNDECIDED = ("QUEUED", "SCHEDULING_STARTED")
"""The scheduling states of a group of which Ray has yet to say whether there is room."""

_STIR_S = 0.02
"""For so long after a group is asked for Ray may try others that wait."""

_last_asked = float("-inf")

_at_ray = asyncio.Lock()
"""Held by whoever asks for a group, or removes one that waits."""


async def create(options: Options, plan: Plan, name: str, connection: Connection) -> PlacementGroup:
    """Ask Ray for one bundle per host; whoever has the group must remove it."""
    async with _at_ray:
        return await _create(options, plan, name, connection)


async def _create(
    options: Options, plan: Plan, name: str, connection: Connection
) -> PlacementGroup:
    global _last_asked
    selectors = [
        {
            **(options.label_selector or {}),
            **({"ray.io/node-id": host.node.node_id} if host.node else {}),
        }
        for host in plan.hosts
    ]
    created: list[PlacementGroup] = []

    def make() -> None:
        group = placement_group(
            [host.bundle for host in plan.hosts],
            strategy=options.placement_strategy,
            name=name,
            bundle_label_selector=selectors,
        )
        created.append(group)

    making = asyncio.create_task(connection.call(make))
    try:
        await asyncio.shield(making)
    except asyncio.CancelledError:  # the group is made all the same
        removing = _remove_once_made(making, created, connection)
        await clean_up(removing, f"removing the placement group {name}")
        raise
    finally:
        _last_asked = time.monotonic()
    return created[0]


async def _remove_once_made(
    making: "asyncio.Task[None]", created: list[PlacementGroup], connection: Connection
) -> None:
    await asyncio.wait({making})
    for group in created:
        await _remove_settled(group, connection)


async def remove(group: PlacementGroup, connection: Connection) -> None:
    """Give back what a placed group holds."""
    try:
        await connection.call(remove_placement_group, group)
    finally:
        queue.release(group)


async def remove_unplaced(group: PlacementGroup, connection: Connection) -> None:
    """Remove a group that Ray may be placing right now.

    Ray loses what it is about to reserve for a group that is removed in that moment: those CPUs
    and GPUs stay taken for as long as the node lives (seen with Ray 2.60: 1 of 60 removals).
    """
    async with _at_ray:
        await asyncio.sleep(_stirred_for_s())
        await _remove_settled(group, connection)


async def _remove_settled(group: PlacementGroup, connection: Connection) -> None:
    deadline = time.monotonic() + _SETTLED_S
    while time.monotonic() < deadline:
        if await connection.call(scheduling_state, group) not in UNDECIDED:
            break
        await asyncio.sleep(0.001)  # Ray has no event for it
    await remove(group, connection)


async def withdraw(group: PlacementGroup, connection: Connection) -> bool:
    """Remove a group that waits, to ask for it anew; False where Ray may be placing it, or has.

    At a moment when nothing that this driver did has Ray try it: see `remove_unplaced`.
    """
    async with _at_ray:
        await asyncio.sleep(_stirred_for_s())
        removing = asyncio.create_task(connection.call(_remove_if_refused, group))
        try:
            return await asyncio.shield(removing)
        except asyncio.CancelledError:
            await clean_up(asyncio.wait({removing}), "removing a placement group that waited")
            raise


def _remove_if_refused(group: PlacementGroup) -> bool:
    if scheduling_state(group) != "NO_RESOURCES":
        return False
    remove_placement_group(group)
    return True


def scheduling_state(group: PlacementGroup) -> str:
    """Return the group's state for Ray; also if Ray knows no such group, as after a restart of the head."""
    table: dict[str, Any] = untyped_ray.util.placement_group_table(group)
    return table["stats"]["scheduling_state"] if table else "REMOVED"


def _stirred_for_s() -> float:
    return max(0.0, _last_asked + _STIR_S - time.monotonic())


def _forget() -> None:
    """A forked child has none of its parent's launches."""
    global _last_asked, _at_ray
    _last_asked, _at_ray = float("-inf"), asyncio.Lock()


in_child(_forget)
