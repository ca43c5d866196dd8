"""Ray's placement groups: made and removed so that none is left, nor what one of them held."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from torchrunx_ray.driver import cluster
from torchrunx_ray.driver.cluster import Node, untyped_ray
from torchrunx_ray.driver.loop import in_thread, to_the_end
from torchrunx_ray.driver.options import Options
from torchrunx_ray.driver.shape import Shape

_RELEASE_S = 1.0
"""What a removed group held is known to be free by then; Ray's nodes report every 0.1 s."""

_SETTLED_S = 2.0
"""Ray places a group, or finds that it cannot, in some milliseconds, unless a node is stuck."""

_last_release = float("-inf")


async def create(options: Options, shape: Shape, name: str) -> PlacementGroup:
    """Ask Ray for one bundle per host; whoever has the group must remove it."""
    selectors = [
        {
            **(options.label_selector or {}),
            **({"ray.io/node-id": host.node.node_id} if host.node else {}),
        }
        for host in shape.hosts
    ]
    created: list[PlacementGroup] = []

    def make() -> None:
        group = placement_group(
            [host.bundle for host in shape.hosts],
            strategy=options.placement_strategy,
            name=name,
            bundle_label_selector=selectors,
        )
        created.append(group)

    try:
        await to_the_end(in_thread(make))
    except asyncio.CancelledError:  # the group was made all the same
        for group in created:
            await to_the_end(remove_unplaced(group))
        raise
    return created[0]


async def remove(group: PlacementGroup) -> None:
    """Give back what a placed group holds."""
    global _last_release
    await in_thread(remove_placement_group, group)
    _last_release = time.monotonic()


async def remove_unplaced(group: PlacementGroup) -> None:
    """Remove a group that Ray may be placing right now.

    Ray loses what it is about to reserve for a group that is removed in that moment: those CPUs
    and GPUs stay taken for as long as the node lives (seen with Ray 2.60: 1 of 60 removals).
    """
    deadline = time.monotonic() + _SETTLED_S
    while time.monotonic() < deadline:
        table: dict[str, Any] = await in_thread(untyped_ray.util.placement_group_table, group)
        if table["stats"]["scheduling_state"] not in ("QUEUED", "SCHEDULING_STARTED"):
            break
        await asyncio.sleep(0.001)  # Ray has no event for it
    await remove(group)


async def see_own_release(shape: Shape, nodes: Sequence[Node]) -> None:
    """Wait until Ray's head knows what we released a moment ago, if it is needed and enough.

    A group that finds it missing is tried again only after a second. There is no event to wait
    on: the nodes report to the head every 0.1 s.
    """
    needed: Counter[str] = Counter()
    for host in shape.hosts:
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
