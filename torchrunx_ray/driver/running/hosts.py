"""Hosts that are held for one run or a session, with an agent on each."""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace

from ray.exceptions import RayError

from torchrunx_ray.driver.agents.pool import PooledAgent
from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.cluster import draining
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.placement import in_words, reserve
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.mending import Mending
from torchrunx_ray.driver.running.ray_answers import answered
from torchrunx_ray.driver.running.reserves import Reserves
from torchrunx_ray.driver.running.roster import Roster
from torchrunx_ray.driver.running.together import all_or_first_error
from torchrunx_ray.errors import AgentFailedError, LaunchError
from torchrunx_ray.wire.messages import TemplateWanted

logger = logging.getLogger("torchrunx_ray")

_QUIET_S = 2.0
"""Time to wait for the end of an earlier run's workers without a warning."""


class Hosts:
    """Reserves hosts, replaces lost ones, and gives all of them back. Used only in the background loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._roster = Roster(options)
        self.reserves = Reserves(self._roster, options.spares)
        self._mending = Mending(options, self._roster, self.reserves)
        self._fences: dict[str, asyncio.Task[bool]] = {}
        """Waits for the ends of an earlier run's workers on silent hosts, by the names of the hosts."""
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
        return self._mending.missing

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
            for fence in self._fences.values():
                fence.cancel()
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
        self, template: TemplateWanted, progress: Progress, *, is_fresh: bool
    ) -> tuple[Crew, str | None]:
        """Return the hosts with an agent on each. Lost hosts are replaced first, unless the hosts are fresh."""
        while True:
            if self.is_closed:
                raise RuntimeError("the session is closed")
            if not self._roster.members:  # an earlier attempt to place the launch found no room
                await self._place(progress)
            elif not is_fresh:
                await self._mending.mend(progress)
            members = list(self._roster.members)
            try:
                met = await all_or_first_error(
                    [member.meet(template, listen=i == 0) for i, member in enumerate(members)]
                )
                gpu_ids = await all_or_first_error([member.gpu_ids() for member in members])
            except ClusterLeft:
                raise
            except (LaunchError, RayError) as error:
                if not await self._can_do_without(progress, error):
                    raise
                is_fresh = False
                continue
            hosts, agents = [each.host for each in members], [each.agent for each in members]
            return Crew(hosts, agents, met, gpu_ids), members[0].placement.backend

    async def _can_do_without(self, progress: Progress, error: BaseException) -> bool:
        """Return True if the hosts that an error is about are left out, or will be replaced."""
        if await self._mending.leave_out_unfit(progress, error):
            return True
        is_of_agent = isinstance(error, AgentFailedError | RayError)
        return is_of_agent and bool(await answered(self._roster.lost(self._roster.members)))

    def forget_call(self) -> None:
        """Let the agents free the function and the arguments of a run that has ended."""
        for host in self._roster.all:
            host.forget_call()

    def fence(self, fences: Mapping[str, "asyncio.Task[bool]"]) -> None:
        """Let the next run wait until the workers of a run that has ended must have ended, too, on silent hosts."""
        self._fences.update(fences)

    async def until_fenced(self, run_name: str) -> None:
        """Wait until no worker of an earlier run may live on. Warn if some may live for ever."""
        fences, self._fences = self._fences, {}
        try:
            if fences:
                await asyncio.wait(fences.values(), timeout=_QUIET_S)
            if late := [label for label, fence in fences.items() if not fence.done()]:
                logger.warning(
                    "%s: waiting until the lease of an earlier run's workers on %s has run out: the host is silent, and "
                    "they would run beside the new ones.",
                    run_name,
                    ", ".join(late),
                )
                await asyncio.wait(fences.values())
        except asyncio.CancelledError:
            self._fences.update(fences)  # for the run after this one
            raise
        if left := [label for label, fence in fences.items() if not _has_ended(fence)]:
            logger.warning(
                "%s: the workers of an earlier run may live on %s, beside those of this run: the host is silent, and Ray "
                "does not say that the actor that grants leases has ended.",
                run_name,
                ", ".join(left),
            )

    async def give_up(self, agents: Collection[PooledAgent]) -> None:
        """End the agents that a run has lost, even if cancelled meanwhile: nothing else refers to them."""
        members = [member for member in self._roster.all if any(map(member.has, agents))]
        if ending := [asyncio.create_task(member.give_up_agent()) for member in members]:
            await to_the_end(asyncio.wait(ending))

    async def lost(self) -> set[str]:
        """Return the names of the hosts whose node is lost or draining."""
        await self.reserves.pause()  # it may remove a placement, about which Ray is asked here
        lost = await answered(self._roster.lost(self._roster.members))
        return {member.host.label for member in lost}

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
        if not options.names_its_hosts and options.least_hosts is not None:
            options = replace(options, hostnames=options.least_hosts)
        name = self._roster.group_name(progress.name)
        self._roster.add_members(await reserve(options, progress, name))
        progress.waiting_for = ""
        await self._mending.take_free(progress)
        members = self._roster.members
        hosts, backend = [member.host for member in members], members[0].placement.backend
        with contextlib.suppress(Exception):  # the launch must not depend on a log handler
            logger.info("%s: %s", progress.name, in_words(hosts, backend, self._options))


def _has_ended(fence: "asyncio.Task[bool]") -> bool:
    return not fence.cancelled() and fence.exception() is None and fence.result()
