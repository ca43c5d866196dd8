"""Reasons to ask a running function to stop: hosts that will leave, and hosts that can join."""

import asyncio
import contextlib
import logging
import time

from torchrunx_ray.driver.cluster.connection import ClusterLeft, news_interval_s
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.hosts import Hosts

logger = logging.getLogger("torchrunx_ray")


class Watch:
    """Watches the hosts of one attempt. Used only in the background loop."""

    def __init__(self, run_name: str, attempt: Attempt, hosts: Hosts, options: Options) -> None:
        self._run_name = run_name
        self._attempt = attempt
        self._hosts = hosts
        self._options = options
        self._may_grow_at = time.monotonic() + options.resize_interval
        self._drains: dict[str, float | None] = {}
        """Draining hosts of which the function was told."""

    def reserves_wanted(self) -> int:
        """Return the number of hosts to keep warm: the spares, and those that may join now."""
        joining = self._hosts.missing if self._may_grow else 0
        return self._options.spares + joining

    async def watch(self) -> None:
        """Ask the function to stop when it should. A failure to learn of this does not end the run."""
        with contextlib.suppress(ClusterLeft):  # the links to the agents report this
            while True:
                await self._until_news()
                try:
                    await self._look()
                except ClusterLeft:
                    raise
                except Exception as error:
                    logger.debug(
                        "%s: could not look for draining hosts", self._run_name, exc_info=error
                    )

    @property
    def _may_grow(self) -> bool:
        return time.monotonic() >= self._may_grow_at

    async def _look(self) -> None:
        leaving = await self._hosts.leaving()
        if leaving and leaving == self._drains:
            return  # the deadline is the same, although it is a little nearer by this clock
        if leaving:
            self._drains = dict(leaving)
            grace_s = self._options.shutdown_timeout
            ends = [at for at in leaving.values() if at is not None]
            within_s = max(0.0, min(ends) - time.time() - grace_s) if ends else grace_s
            if self._attempt.ask_to_stop("drain", within_s):
                logger.warning(
                    "%s: Ray drains %s; the function is asked to stop within %.1f s, and then runs again without it",
                    self._run_name,
                    ", ".join(leaving),
                    within_s,
                )
        elif self._may_grow and self._hosts.missing > 0 and self._hosts.reserves.ready:
            within_s = self._options.shutdown_timeout
            if self._attempt.ask_to_stop("resize", within_s):
                joining = ", ".join(host.host.label for host in self._hosts.reserves.ready)
                logger.info(
                    "%s: %s can join; the function is asked to stop within %.1f s, and then runs again on more hosts",
                    self._run_name,
                    joining,
                    within_s,
                )

    async def _until_news(self) -> None:
        changed = self._hosts.reserves.changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(news_interval_s()):
                await changed.wait()
        changed.clear()
