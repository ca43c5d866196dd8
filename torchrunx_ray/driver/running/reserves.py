"""Hosts that are held and warm without workers: spares, and hosts that will join an elastic launch."""

import asyncio
import logging
import time
from collections.abc import Callable

from ray.exceptions import RayError

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.cluster.connection import ClusterLeft, news_interval_s
from torchrunx_ray.driver.running.held_host import HeldHost
from torchrunx_ray.driver.running.roster import Roster
from torchrunx_ray.errors import LaunchError, counted
from torchrunx_ray.wire.messages import TemplateWanted

logger = logging.getLogger("torchrunx_ray")

_CHECK_S = 2.0
"""Interval at which the agents and nodes of the reserves are checked. Nothing else asks them anything."""

_AFTER_FAILURE_S = 10.0
"""Pause after a host could not be warmed."""


class Reserves:
    """Keeps as many warm hosts as are wanted, as far as the cluster has room. Used only in the background loop."""

    def __init__(self, roster: Roster, spares: int) -> None:
        self._roster = roster
        self._spares = spares
        self._working: asyncio.Task[None] | None = None
        self._template: TemplateWanted | None = None
        self._checked_at = 0.0
        self._told_run = ""
        """Name of the last run for which missing spares were logged."""
        self.ready: list[HeldHost] = []
        """Warm hosts of the roster's reserves."""
        self.changed = asyncio.Event()
        """Set when a host has become warm."""

    def begin(self, run_name: str, template: TemplateWanted, wanted: Callable[[], int]) -> None:
        """Keep `wanted()` hosts warm until `pause`."""
        assert self._working is None
        if self._template != template:
            self._template, self.ready = template, []
        self._working = asyncio.create_task(self._work(run_name, template, wanted))

    def take(self, *, warm_only: bool = True) -> HeldHost | None:
        """Return a host, which the caller then owns; None if there is none. Warm hosts come first."""
        hosts = self.ready if warm_only else [*self.ready, *self._roster.reserves]
        if not hosts:
            return None
        host = hosts[0]
        self._forget(host)
        return host

    def put(self, host: HeldHost) -> None:
        """Take a host without an agent. The host is ready when it is warm again."""
        self._roster.reserves.append(host)

    async def trim(self, most: int) -> None:
        """Release the hosts beyond this number, those that are not warm first."""
        cold = [host for host in self._roster.reserves if host not in self.ready]
        for host in [*self.ready, *cold][most:]:
            self._forget(host)
            await to_the_end(host.release())

    async def pause(self) -> None:
        """Stop. Hosts that are not warm yet stay held."""
        working, self._working = self._working, None
        if working is not None:
            working.cancel()
            await to_the_end(asyncio.wait({working}))

    async def close(self) -> None:
        await self.pause()
        self.ready = []

    async def _work(self, name: str, template: TemplateWanted, wanted: Callable[[], int]) -> None:
        """Go on until cancelled: the run does not depend on the reserves."""
        while True:
            pause_s = news_interval_s()
            try:
                pause_s = await self._step(name, template, wanted)
            except ClusterLeft:
                return  # the links to the agents report this
            except Exception as error:  # as while Ray's head restarts
                logger.debug("%s: could not look for more hosts", name, exc_info=error)
            await asyncio.sleep(pause_s)

    async def _step(self, name: str, template: TemplateWanted, wanted: Callable[[], int]) -> float:
        """Take or warm one host. Returns the time until the next step."""
        await self._check(name)
        host = next((each for each in self._roster.reserves if each not in self.ready), None)
        if host is None and len(self.ready) < wanted():
            host = await self._recruit(name)
        if host is None:
            return news_interval_s()
        return await self._warm(name, host, template)

    async def _recruit(self, name: str) -> HeldHost | None:
        host = await self._roster.recruit(name)
        if host is not None:
            self._roster.reserves.append(host)
        elif self._told_run != name and (missing := self._spares - len(self.ready)) > 0:
            self._told_run = name
            logger.warning(
                "%s runs with %d of %s: the cluster has no room for %d more at this moment. Each takes its place as "
                "soon as there is room.",
                name,
                self._spares - missing,
                counted(self._spares, "spare"),
                missing,
            )
        return host

    async def _warm(self, name: str, host: HeldHost, template: TemplateWanted) -> float:
        try:
            await host.warm(template)
        except ClusterLeft:
            raise
        except (LaunchError, RayError, TimeoutError) as error:
            logger.warning(
                "%s: %s can be no spare, and cannot join: %s", name, host.host.label, error
            )
            await to_the_end(self._dismiss(host))
            return _AFTER_FAILURE_S
        self.ready.append(host)
        self.changed.set()
        return 0

    async def _check(self, name: str) -> None:
        """Dismiss lost hosts, and note those whose agent has ended, so that they get a new one."""
        if not self._roster.reserves or time.monotonic() - self._checked_at < _CHECK_S:
            return
        hosts = list(self.ready)
        answers = await asyncio.gather(*(host.answers() for host in hosts))
        for host in [host for host, is_well in zip(hosts, answers, strict=True) if not is_well]:
            self.ready.remove(host)
            await host.give_up_agent()
        for host, why in (await self._roster.lost(self._roster.reserves)).items():
            logger.warning("%s: the spare host %s is lost: %s", name, host.host.label, why)
            await to_the_end(self._dismiss(host))
        self._checked_at = time.monotonic()

    async def _dismiss(self, host: HeldHost) -> None:
        self._forget(host)
        self._roster.losses.note_lost_host(host.node_id)
        await host.abandon()
        await self._roster.remove_unused()

    def _forget(self, host: HeldHost) -> None:
        self._roster.reserves.remove(host)
        if host in self.ready:
            self.ready.remove(host)
