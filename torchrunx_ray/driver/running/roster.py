"""All hosts of a launch, with their placement groups, and what Ray says of them."""

import asyncio
import functools
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from torchrunx_ray.driver.cluster import draining, inventory
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.labels import distinct_label
from torchrunx_ray.driver.placing.one_more import reserve_free
from torchrunx_ray.driver.placing.placement import Placement
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.running.held_host import HeldHost, HeldState, node_answers
from torchrunx_ray.driver.running.losses import Losses

_DOUBTFUL = (HeldState.SUSPECT, HeldState.UNFIT)

_SILENT_S = 5.0
"""Time for which a node that has not answered is not asked again. A question to a silent node takes seconds."""


class Roster:
    """Members of a launch in the order of their ranks, and its reserves. Used only in the background loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._placements: list[Placement] = []
        self._group_numbers = itertools.count()
        self.losses = Losses()
        self._silent_at: dict[str, float] = {}
        """Times at which nodes did not answer, by node id, on the monotonic clock."""
        self.members: list[HeldHost] = []
        self.reserves: list[HeldHost] = []
        """Hosts without workers."""

    @property
    def all(self) -> list[HeldHost]:
        return [*self.members, *self.reserves]

    @property
    def _not_lost(self) -> list[HeldHost]:
        return [host for host in self.all if host.state is not HeldState.LOST]

    @property
    def apart(self) -> set[str]:
        """Nodes that no further host may be on, because one is there."""
        if self._options.placement_strategy != "STRICT_SPREAD":
            return set()
        return {host.node_id for host in self._not_lost}

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

    def replace(self, lost: HeldHost, host: HeldHost) -> bool:
        """Let a host take the place of a lost one. Returns False if the place or the host's node is taken."""
        if lost not in self.members or host.node_id in self.apart:
            return False
        self.members[self.members.index(lost)] = host
        return True

    async def recruit(self, name: str, like: Host | None = None) -> HeldHost | None:
        """Return one more host in room that is free at this moment; None if there is none.

        A bundle that Ray has moved, and that no host uses, is taken first. `like` is the host to replace, if any.
        """
        if (host := await self.moved(like)) is not None:
            return host
        held: list[Host] = [host.host for host in self.all]
        avoided = self.losses.shunned | self.losses.distrusted
        group_name = functools.partial(self.group_name, name)
        placement = await reserve_free(self._options, like or held[0], held, avoided, group_name)
        return None if placement is None else self.add(placement)

    async def lost(self, hosts: Sequence[HeldHost]) -> dict[HeldHost, str]:
        """Return those of these hosts whose node or bundle is lost, each with the reason."""
        connection = Connection()
        nodes, leaving, placed = await asyncio.gather(
            connection.call(inventory.live_nodes), draining.deadlines(connection), self._placed()
        )
        live = {node.node_id for node in nodes}
        lost: dict[HeldHost, str] = {}
        for host in hosts:
            if host.state is HeldState.LOST:
                lost[host] = "it was lost before, and has not been replaced"
            elif host.node_id not in live:
                lost[host] = "its node has left the cluster"
            elif placed[host.placement, host.bundle] != host.node_id:
                lost[host] = "Ray has moved its bundle to another node"
            elif host.node_id in leaving:
                lost[host] = "Ray drains its node"
            elif host.state in _DOUBTFUL and not await self._answers(host.host.node):
                lost[host] = "its node does not answer"
        return lost

    async def moved(self, like: Host | None = None, *, anywhere: bool = False) -> HeldHost | None:
        """Return a host for a bundle that no host uses, on a node that answers; None if there is none.

        Ray places the bundle of a dead node again, once it knows of the death. The caller must add the host to the
        members or the reserves at once, so that nobody else takes the bundle. `like` is the host to replace, if any.
        `anywhere`: a node that failed twice is good enough.
        """
        unused = {
            bundle: node_id
            for bundle, node_id in (await self._placed()).items()
            if node_id is not None and self._is_unused(bundle) and _is_for(bundle, like)
        }
        if not unused:
            return None
        nodes = {node.node_id: node for node in await Connection().call(inventory.live_nodes)}
        unfit = {*self.losses.shunned, *await draining.deadlines(Connection())}
        unfit |= set() if anywhere else self.losses.distrusted
        for bundle, node_id in unused.items():
            node = None if node_id in unfit else nodes.get(node_id)
            if node is None or node_id in self.apart or not await self._answers(node):
                continue
            if self._is_unused(bundle) and node_id not in self.apart:
                return self._held(*bundle, node)
        return None

    async def remove_unused(self) -> None:
        """Remove the placements none of whose bundles has a host that is not lost."""
        used = {host.placement for host in self._not_lost}
        unused = [each for each in self._placements if each not in used]
        self._placements = [each for each in self._placements if each in used]
        await asyncio.gather(*(placement.remove() for placement in unused))

    async def _answers(self, node: Node) -> bool:
        if time.monotonic() - self._silent_at.get(node.node_id, -math.inf) < _SILENT_S:
            return False
        answers = await node_answers(node)
        if not answers:
            self._silent_at[node.node_id] = time.monotonic()
        return answers

    def _is_unused(self, bundle: tuple[Placement, int]) -> bool:
        return all((host.placement, host.bundle) != bundle for host in self._not_lost)

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


def _is_for(bundle: tuple[Placement, int], like: Host | None) -> bool:
    """Return True if the bundle is for as many workers as this host."""
    placement, index = bundle
    return like is None or placement.hosts[index].workers == like.workers
