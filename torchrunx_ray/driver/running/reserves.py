"""Hosts that are held and warm without workers: spares, and hosts that will join an elastic launch."""

import asyncio
import logging
from collections.abc import Callable

from ray.exceptions import RayError

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.cluster.connection import ClusterLeft
from torchrunx_ray.driver.running.held_host import HeldHost
from torchrunx_ray.driver.running.roster import Roster
from torchrunx_ray.errors import LaunchError
from torchrunx_ray.wire.messages import TemplateWanted

logger = logging.getLogger("torchrunx_ray")

_LOOK_S = 0.5
"""Interval at which room for more hosts is looked for. Ray has no event for a node that joins or room that becomes free."""

_AFTER_FAILURE_S = 10.0
"""Pause after a host could not be warmed."""


class Reserves:
    """Keeps as many warm hosts as are wanted, as far as the cluster has room. Used only in the background loop."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._working: asyncio.Task[None] | None = None
        self.ready: list[HeldHost] = []
        """Warm hosts of the roster's reserves."""
        self.changed = asyncio.Event()
        """Set when a host has become warm."""

    def begin(self, run_name: str, template: TemplateWanted, wanted: Callable[[], int]) -> None:
        """Keep `wanted()` hosts warm until `pause`."""
        assert self._working is None
        self._working = asyncio.create_task(self._work(run_name, template, wanted))

    def take(self) -> HeldHost | None:
        """Return a warm host, which the caller then owns; None if there is none."""
        if not self.ready:
            return None
        host = self.ready.pop(0)
        self._roster.reserves.remove(host)
        return host

    def take_cold(self) -> HeldHost | None:
        """Return a host that is not warm yet, which the caller then owns; None if there is none. Call after `pause`."""
        cold = next((host for host in self._roster.reserves if host not in self.ready), None)
        if cold is not None:
            self._roster.reserves.remove(cold)
        return cold

    def put(self, host: HeldHost) -> None:
        """Take a host without an agent. The host is ready when it is warm again."""
        self._roster.reserves.append(host)

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
        has_told = False
        while True:
            host = next((each for each in self._roster.reserves if each not in self.ready), None)
            if host is None and len(self.ready) < wanted():
                host = await self._roster.recruit(name)
                if host is not None:
                    self._roster.reserves.append(host)
                elif not has_told:
                    has_told = True
                    _tell_of_no_room(name, wanted() - len(self.ready))
            await (asyncio.sleep(_LOOK_S) if host is None else self._warm(name, host, template))

    async def _warm(self, name: str, host: HeldHost, template: TemplateWanted) -> None:
        try:
            await host.warm(template)
        except ClusterLeft:
            raise
        except (LaunchError, RayError, TimeoutError) as error:
            logger.warning("%s: %s cannot be a spare: %s", name, host.host.label, error)
            await to_the_end(self._dismiss(host))
            await asyncio.sleep(_AFTER_FAILURE_S)
        else:
            self.ready.append(host)
            self.changed.set()

    async def _dismiss(self, host: HeldHost) -> None:
        self._roster.reserves.remove(host)
        self._roster.shun(host.node_id)
        await host.release()
        await self._roster.remove_unused()


def _tell_of_no_room(name: str, missing: int) -> None:
    logger.info(
        "%s: the cluster has no room for %d more at this moment; the run goes on without them",
        name,
        missing,
    )
