"""Replacement of lost hosts, and hosts that join, before an attempt."""

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.cluster import draining
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.one_more import in_place_of, reserve_when_there
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.running.held_host import HeldHost, HeldState
from torchrunx_ray.driver.running.ray_answers import answered
from torchrunx_ray.driver.running.reserves import Reserves
from torchrunx_ray.driver.running.roster import Roster
from torchrunx_ray.driver.running.together import all_or_first_error

logger = logging.getLogger("torchrunx_ray")

_MOVED_S = 0.5
"""Interval at which a launch that waits for a host looks if Ray has placed a bundle again."""

_SHUNNED_S = 11.0
"""Length of a request that rules out a node for a while. The next request may use the node again."""


class Mending:
    """Mends the roster of a launch between attempts. Used only in the background loop."""

    def __init__(self, options: Options, roster: Roster, reserves: Reserves) -> None:
        self._options = options
        self._roster = roster
        self._reserves = reserves

    @property
    def missing(self) -> int:
        """Number of hosts that an elastic launch may have besides those that it has."""
        most = self._options.most_hosts
        if most is None or not self._options.is_elastic:
            return 0
        return most - len(self._roster.members)

    async def mend(self, progress: Progress) -> None:
        """Replace lost hosts. An elastic launch goes on without them, and takes free hosts."""
        await self._reserves.pause()
        try:
            lost = await answered(self._roster.lost(self._roster.members))
            for member, why in lost.items():
                logger.warning("%s: the host %s is lost: %s", progress.name, member.host.label, why)
                self._roster.losses.note_lost_host(member.node_id)
            await asyncio.gather(*(member.abandon() for member in lost))
            # While Ray looks for a place for a lost bundle, and each node that could take it is full, Ray 2.60 places
            # no other group.
            await to_the_end(self._roster.remove_unused())
            await self._fill(lost, progress)
            await self._leave_bad_hosts(progress)
            await self.take_free(progress)
            await self._reserves.trim(self._options.spares + self.missing)
        finally:
            await to_the_end(self._roster.remove_unused())

    async def leave_out_unfit(self, progress: Progress, error: BaseException) -> bool:
        """Let an elastic launch go on without new hosts that could not be met. Returns False if it needs them."""
        members = self._roster.members
        unfit = [member for member in members if member.state is HeldState.UNFIT]
        least = self._options.least_hosts
        if not (unfit and self._options.is_elastic and least):
            return False
        if len(members) - len(unfit) < least:
            return False
        for member in unfit:
            logger.warning("%s goes on without %s: %s", progress.name, member.host.label, error)
            self._roster.losses.note_lost_host(member.node_id)
            members.remove(member)
            await to_the_end(member.abandon())
        await to_the_end(self._roster.remove_unused())
        return True

    async def take_free(self, progress: Progress) -> None:
        """Add the hosts that an elastic launch may have, and for which there is room at this moment."""
        while self.missing > 0:
            host = self._reserves.take(warm_only=False)
            host = host or await answered(self._roster.recruit(progress.name))
            if host is None:
                return
            self._roster.members.append(host)

    async def _leave_bad_hosts(self, progress: Progress) -> None:
        """Let others take over from hosts whose agent was lost: spares, or free room if the node failed twice."""
        members = self._roster.members
        for i, member in enumerate(members):
            if member.state is not HeldState.SUSPECT:
                continue
            self._roster.losses.note_failure(member.node_id)
            if (spare := self._reserves.take()) is not None:
                members[i] = spare
                self._reserves.put(member)
            elif self._may_move(member) and (
                host := await answered(self._roster.recruit(progress.name, member.host))
            ):
                members[i] = host
                await to_the_end(member.abandon())

    def _may_move(self, member: HeldHost) -> bool:
        is_bad = member.node_id in self._roster.losses.distrusted
        return is_bad and not self._options.names_its_hosts

    async def _fill(self, lost: Collection[HeldHost], progress: Progress) -> None:
        """Fill the places of lost hosts, or close up if enough hosts are left."""
        members = self._roster.members
        for member in lost:
            host = self._reserves.take() or await answered(self._roster.moved(member.host))
            if host is not None:
                members[members.index(member)] = host
        holes = [member for member in members if member in lost]
        is_fixed = self._options.names_its_hosts
        least = self._options.least_hosts or (len(members) if is_fixed else 1)
        awaited = holes[: max(0, least - (len(members) - len(holes)))]
        awaited = [member for member in awaited if not self._takes_cold_one(member)]
        await all_or_first_error([self._fill_place(member, progress) for member in awaited])
        self._roster.members = [member for member in members if member not in lost]

    def _takes_cold_one(self, lost: HeldHost) -> bool:
        """Let a reserve that is not warm yet take a lost host's place. It may hold the only room that there is."""
        host = self._reserves.take(warm_only=False)
        if host is None or self._roster.replace(lost, host):
            return host is not None
        self._reserves.put(host)
        return False

    async def _fill_place(self, lost: HeldHost, progress: Progress) -> None:
        """Wait for a host in the place of a lost one: of a group of its own, or of a bundle that Ray has moved."""
        reserving = asyncio.create_task(self._reserve_place(lost, progress))
        moving = asyncio.create_task(self._until_moved(lost))
        for task in (reserving, moving):
            # Only one of two errors is raised. asyncio would report the other one.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        del task
        try:
            await asyncio.wait({reserving, moving}, return_when=asyncio.FIRST_COMPLETED)
            if reserving.done() and lost in self._roster.members:
                reserving.result()
            if moving.done() and lost in self._roster.members:
                moving.result()
        finally:
            reserving.cancel()
            moving.cancel()
            await to_the_end(asyncio.wait({reserving, moving}))
            # An exception refers to this frame, and must not wait for Python's gc.
            del reserving, moving

    async def _reserve_place(self, lost: HeldHost, progress: Progress) -> None:
        """Reserve room of its own for a host in the place of a lost one.

        Room on a node that the replacement of another host has just taken stays unused, and is given back later.
        """
        name = progress.name
        if not self._options.names_its_hosts:
            host = await self._roster.recruit(name, lost.host)
            if host is not None and await self._takes_over(lost, host):
                return
        while lost in self._roster.members:
            placement = await reserve_when_there(
                lambda: self._wanted(lost),
                self._options.placement_timeout,
                progress,
                self._roster.group_name(name),
            )
            if await self._takes_over(lost, self._roster.add(placement)):
                return

    async def _wanted(self, lost: HeldHost) -> Options:
        """Return options for a host in the place of a lost one, as far as is known at this moment."""
        leaving = await draining.deadlines(Connection())
        shunned = self._roster.losses.shunned
        options = in_place_of(lost.host, self._options, {*self._roster.apart, *shunned, *leaving})
        return replace(options, placement_timeout=_SHUNNED_S if shunned else None)

    async def _until_moved(self, lost: HeldHost) -> None:
        """Wait for a moved bundle, on any node: bundles on better nodes have been taken by now."""
        while True:
            await asyncio.sleep(_MOVED_S)
            host = await self._roster.moved(lost.host, anywhere=True)
            if host is not None and await self._takes_over(lost, host):
                return

    async def _takes_over(self, lost: HeldHost, host: HeldHost) -> bool:
        """Let a host take the place of a lost one. Returns False if the place or the node was taken meanwhile."""
        if self._roster.replace(lost, host):
            return True
        await host.abandon()
        return False
