"""Hosts that are held for one run or a session, with an agent on each."""

import asyncio
import logging
from collections.abc import Awaitable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayError

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.cluster import draining
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.one_more import in_place_of, reserve_when_there
from torchrunx_ray.driver.placing.placement import reserve
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.held_host import HeldHost, HeldState
from torchrunx_ray.driver.running.reserves import Reserves
from torchrunx_ray.driver.running.roster import Roster
from torchrunx_ray.errors import AgentFailedError, LaunchError
from torchrunx_ray.wire.messages import TemplateWanted

T = TypeVar("T")

logger = logging.getLogger("torchrunx_ray")

_ANSWER_S = 120.0
"""Time for Ray's answer about a placement. A restart of the head may delay the answer."""

_MOVED_S = 0.5
"""Interval at which a launch that waits for a host looks if Ray has placed a bundle again."""


class Hosts:
    """Reserves hosts, replaces lost ones, and gives all of them back. Used only in the background loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._roster = Roster(options)
        self.reserves = Reserves(self._roster)
        self.is_closed = False
        self.turn = asyncio.Lock()
        """Held by one run at a time, and while the hosts are taken or given back."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hosts; empty before they are placed, and after `close`."""
        return tuple(member.host.label for member in self._roster.members)

    @property
    def held(self) -> list[Host]:
        """Hosts whose resources are held."""
        return [host.host for host in self._roster.all if host.placement.is_held]

    @property
    def missing(self) -> int:
        """Number of hosts that an elastic launch may have besides those that it has."""
        most = self._options.most_hosts
        if most is None or not self._options.is_elastic:
            return 0
        return most - len(self._roster.members)

    async def open(self, progress: Progress) -> None:
        """Reserve room in the cluster. `close` waits until this has ended, or its cancellation has cleaned up."""
        async with self.turn:
            if self.is_closed:
                raise RuntimeError("the session is closed")
            await self._place(progress)

    async def close(self) -> None:
        """Let the agents rest or end, and give the room back. Safe to call again."""
        async with self.turn:
            self.is_closed = True
            await self.reserves.close()
            held = self._roster.all
            self._roster.members, self._roster.reserves = [], []
            releasing = [host.release() for host in held]
            released = await asyncio.gather(*releasing, return_exceptions=True)
            await self._roster.remove_unused()
            for done in released:
                if isinstance(done, BaseException):
                    logger.warning("an agent could not be released: %s", done)

    async def assemble(
        self,
        template: TemplateWanted,
        progress: Progress,
        *,
        is_fresh: bool = False,
        tries: int = 1,
    ) -> tuple[Crew, str | None]:
        """Return the hosts with an agent on each. Lost hosts are replaced first, unless the hosts are fresh.

        `tries` is how often an agent may fail although its node is not lost.
        """
        while True:
            if self.is_closed:
                raise RuntimeError("the session is closed")
            if not self._roster.members:  # an earlier attempt to place the launch found no room
                await self._place(progress)
            elif not is_fresh:
                await self._mend(progress)
            members = list(self._roster.members)
            try:
                met = await _all_or_first_error(
                    [member.meet(template, listen=i == 0) for i, member in enumerate(members)]
                )
                gpu_ids = await _all_or_first_error([member.gpu_ids() for member in members])
            except (AgentFailedError, RayError):
                if not await _answered(self._roster.lost()):
                    tries -= 1
                    if tries == 0:
                        raise
                is_fresh = False
                continue
            hosts, agents = [each.host for each in members], [each.agent for each in members]
            return Crew(hosts, agents, met, gpu_ids), members[0].placement.backend

    async def give_up(self, indices: Collection[int]) -> None:
        """End the agents that a run has lost, even if cancelled meanwhile: nothing else refers to them."""
        members = [self._roster.members[i] for i in indices]
        if ending := [asyncio.create_task(member.give_up_agent()) for member in members]:
            await to_the_end(asyncio.wait(ending))

    async def has_lost_some(self) -> bool:
        """Return True if the node of a host is lost."""
        return bool(await _answered(self._roster.lost()))

    async def leaving(self) -> dict[str, float | None]:
        """Return the hosts whose nodes Ray drains, with the times at which they end."""
        deadlines = await draining.deadlines(Connection())
        return {
            member.host.label: deadlines[member.node_id]
            for member in self._roster.members
            if member.node_id in deadlines
        }

    async def _place(self, progress: Progress) -> None:
        """Reserve the hosts that must be there together, and those that an elastic launch may have besides."""
        options = self._options
        if options.is_elastic and options.least_hosts is not None:
            options = replace(options, hostnames=options.least_hosts)
        name = self._roster.group_name(progress.name)
        self._roster.add_members(await reserve(options, progress, name))
        await self._take_free(progress)

    async def _take_free(self, progress: Progress) -> None:
        """Add the hosts that an elastic launch may have, and for which there is room at this moment."""
        while self.missing > 0:
            host = self.reserves.take() or await self._roster.recruit(progress.name)
            if host is None:
                return
            self._roster.members.append(host)

    async def _mend(self, progress: Progress) -> None:
        """Replace lost hosts. An elastic launch goes on without them, and takes free hosts."""
        await self.reserves.pause()
        lost = await _answered(self._roster.lost())
        for member, why in lost.items():
            logger.warning("%s: the host %s is lost: %s", progress.name, member.host.label, why)
            self._roster.shun(member.node_id)
        await asyncio.gather(*(member.give_up_agent() for member in lost))
        await self._fill(lost, progress)
        self._swap_for_warm_ones()
        await self._take_free(progress)
        await self._roster.remove_unused()

    def _swap_for_warm_ones(self) -> None:
        """Let spares take over from hosts whose agent was lost. Those become spares when they are warm again."""
        members = self._roster.members
        for i, member in enumerate(members):
            if member.state is HeldState.SUSPECT and (spare := self.reserves.take()):
                members[i] = spare
                self.reserves.put(member)

    async def _fill(self, lost: Collection[HeldHost], progress: Progress) -> None:
        """Fill the places of lost hosts, or close up if enough hosts are left."""
        members = self._roster.members
        for i, member in enumerate(members):
            if member in lost and (host := self.reserves.take() or await self._roster.moved()):
                members[i] = host
        holes = [i for i, member in enumerate(members) if member in lost]
        least = self._options.least_hosts or 1
        awaited = holes[: max(0, least - (len(members) - len(holes)))]
        filled = await _all_or_first_error(
            [self._await_host(members[i], progress) for i in awaited]
        )
        for i, host in zip(awaited, filled, strict=True):
            members[i] = host
        self._roster.members = [member for member in members if member not in lost]

    async def _await_host(self, lost: HeldHost, progress: Progress) -> HeldHost:
        """Wait for a host in the place of a lost one: of a group of its own, or of a bundle that Ray has moved.

        A reserve that is still cold may hold the only room that there is.
        """
        if (cold := self.reserves.take_cold()) is not None:
            return cold
        leaving = await draining.deadlines(Connection())
        avoided = {*self._roster.apart, *self._roster.shunned, *leaving}
        options = in_place_of(lost.host, self._options, avoided)
        name = self._roster.group_name(progress.name)
        reserving = asyncio.create_task(reserve_when_there(options, progress, name))
        moving = asyncio.create_task(self._until_moved())
        try:
            await asyncio.wait({reserving, moving}, return_when=asyncio.FIRST_COMPLETED)
            if reserving.done():
                return self._roster.add(reserving.result())
            return moving.result()
        finally:
            for task in (reserving, moving):
                task.cancel()
            await to_the_end(asyncio.wait({reserving, moving}))
            del reserving, moving  # an exception refers to this frame

    async def _until_moved(self) -> HeldHost:
        while (host := await self._roster.moved()) is None:
            await asyncio.sleep(_MOVED_S)
        return host


async def _answered(question: Awaitable[T]) -> T:
    """Await an answer of Ray. Raises LaunchError after _ANSWER_S."""
    limit = asyncio.timeout(_ANSWER_S)
    try:
        async with limit:
            return await question
    except TimeoutError:
        if not limit.expired():
            raise
        raise LaunchError(
            f"Ray has not answered a query about the placement of the launch for {_ANSWER_S:g} s. Is the head's "
            "machine frozen, overloaded or cut off? Check with `ray status` on that machine. Launch again."
        ) from None
    finally:
        del limit  # it refers to the task, whose exception refers to this frame


async def _all_or_first_error(work: "Sequence[Coroutine[Any, Any, T]]") -> list[T]:
    """Return all results. At the first error, cancel the other tasks, wait for them, and raise the error."""
    tasks = [asyncio.create_task(each) for each in work]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done() and task.exception() is not None]
        return [task.result() for task in failed or tasks]
    finally:
        for task in tasks:
            task.cancel()
        await to_the_end(asyncio.wait(tasks))
        del tasks, work  # an exception refers to this frame, and must not wait for Python's gc
