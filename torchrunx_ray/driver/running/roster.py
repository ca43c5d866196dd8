"""All hosts of a launch, with their placement groups, and what Ray says of them."""

import asyncio
import functools
import itertools
import time
from dataclasses import replace

from torchrunx_ray.driver.cluster import draining, inventory
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.labels import distinct_label
from torchrunx_ray.driver.placing.one_more import reserve_free
from torchrunx_ray.driver.placing.placement import Placement
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.running.held_host import HeldHost, HeldState

_SHUNNED_S = 10.0
"""Time for which the node of a lost host gets no new host, although Ray may still call the node alive."""


class Roster:
    """Members of a launch in the order of their ranks, and its reserves. Used only in the background loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._placements: list[Placement] = []
        self._group_numbers = itertools.count()
        self._lost_at: dict[str, float] = {}
        """Times of the losses by node id, on the monotonic clock."""
        self.members: list[HeldHost] = []
        self.reserves: list[HeldHost] = []
        """Hosts without workers."""

    @property
    def all(self) -> list[HeldHost]:
        return [*self.members, *self.reserves]

    @property
    def apart(self) -> set[str]:
        """Nodes that no further host may be on, because one is there."""
        is_apart = self._options.placement_strategy == "STRICT_SPREAD"
        return {host.node_id for host in self.all if is_apart}

    @property
    def shunned(self) -> set[str]:
        """Nodes whose host was lost a moment ago."""
        now = time.monotonic()
        return {node_id for node_id, at in self._lost_at.items() if now - at < _SHUNNED_S}

    def shun(self, node_id: str) -> None:
        self._lost_at[node_id] = time.monotonic()

    def group_name(self, name: str) -> str:
        """Return the name of the launch's next placement group. Ray refuses a second group with the same name."""
        number = next(self._group_numbers)
        return f"{name}.{number}" if number else name

    def add_members(self, placement: Placement) -> None:
        self._placements.append(placement)
        self.members += [
            HeldHost(host, placement, i, self._options) for i, host in enumerate(placement.hosts)
        ]

    def add(self, placement: Placement) -> HeldHost:
        """Return the only host of a placement, which the caller then owns."""
        self._placements.append(placement)
        return self._held(placement, 0, placement.hosts[0].node)

    async def recruit(self, name: str) -> HeldHost | None:
        """Reserve room for one host that is free at this moment; None if there is none."""
        held: list[Host] = [host.host for host in self.all]
        placement = await reserve_free(
            self._options, held, self.shunned, functools.partial(self.group_name, name)
        )
        return None if placement is None else self.add(placement)

    async def lost(self) -> dict[HeldHost, str]:
        """Return the members whose node or bundle is lost, each with the reason."""
        connection = Connection()
        nodes, leaving, placed = await asyncio.gather(
            connection.call(inventory.live_nodes), draining.deadlines(connection), self._placed()
        )
        live = {node.node_id for node in nodes}
        lost: dict[HeldHost, str] = {}
        for member in self.members:
            if member.node_id not in live:
                lost[member] = "its node has left the cluster"
            elif placed[member.placement, member.bundle] != member.node_id:
                lost[member] = "Ray has moved its bundle to another node"
            elif member.node_id in leaving:
                lost[member] = "Ray drains its node"
            elif member.state is HeldState.SUSPECT and not await _answers(member.host.node):
                lost[member] = "its node does not answer"
        return lost

    async def moved(self) -> HeldHost | None:
        """Return a host for a bundle that no host uses, on a node that answers; None if there is none.

        Ray places the bundle of a dead node again, once it knows of the death.
        """
        used = {(host.placement, host.bundle) for host in self.all}
        unused = {
            bundle: node_id
            for bundle, node_id in (await self._placed()).items()
            if bundle not in used and node_id is not None
        }
        if not unused:
            return None
        nodes = {node.node_id: node for node in await Connection().call(inventory.live_nodes)}
        unfit = {*self.apart, *self.shunned, *await draining.deadlines(Connection())}
        for (placement, bundle), node_id in unused.items():
            node = None if node_id in unfit else nodes.get(node_id)
            if node is not None and await _answers(node):
                return self._held(placement, bundle, node)
        return None

    async def remove_unused(self) -> None:
        """Remove the placements none of whose bundles has a host."""
        used = {host.placement for host in self.all}
        unused = [each for each in self._placements if each not in used]
        self._placements = [each for each in self._placements if each in used]
        await asyncio.gather(*(placement.remove() for placement in unused))

    def _held(self, placement: Placement, bundle: int, node: Node) -> HeldHost:
        host = placement.hosts[bundle]
        label = host.label
        if not self._options.names_its_hosts:
            label = distinct_label(node, {each.host.label for each in self.all})
        return HeldHost(replace(host, node=node, label=label), placement, bundle, self._options)

    async def _placed(self) -> dict[tuple[Placement, int], str | None]:
        """Return the node of every bundle."""
        placements = list(self._placements)
        node_ids = await asyncio.gather(*(each.node_ids() for each in placements))
        return {
            (placement, i): node_id
            for placement, of_bundles in zip(placements, node_ids, strict=True)
            for i, node_id in enumerate(of_bundles)
        }


async def _answers(node: Node) -> bool:
    connection = Connection()
    return await connection.call(connection.inside, inventory.answers, node)
