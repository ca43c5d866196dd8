"""Services of an agent that a run claims: the watchdog's FIFO and the port of the health checks."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torchrunx_ray.agent.condition import Condition
from torchrunx_ray.agent.health import HealthPortError, HealthPortInUseError, HealthServer
from torchrunx_ray.agent.timer_file import TimerFileError, TimerFileInUseError
from torchrunx_ray.agent.watchdog import Watchdog

T = TypeVar("T")

_BEAT_S = 0.5
"""Interval at which the agent's event loop shows that it runs, for the health checks."""


_IN_USE_S = 1.0
"""Time for another agent to leave a path or a port that the user chose."""

WatchdogPlace = tuple[Path, Path] | None
"""Path of the FIFO, and the template's folder; None if no watchdog is wanted."""


class Services:
    """Open from a claim until the agent rests, also between the attempts of a run."""

    def __init__(self, ip: str, condition: Condition) -> None:
        self._ip = ip
        self._condition = condition
        self.watchdog: Watchdog | None = None
        self._health: HealthServer | None = None
        self._health_port_wanted: int | None = None
        self._beating: asyncio.TimerHandle | None = None

    @property
    def health_port(self) -> int | None:
        return None if self._health is None else self._health.port

    async def open(self, place: WatchdogPlace, health_port: int | None) -> str | None:
        """Open what a run wants, and close the rest. Return the reason if that is not possible."""
        try:
            await self._open_watchdog(place)
            await self._open_health(health_port)
        except (TimerFileError, HealthPortError) as error:
            await self.close()
            return str(error)
        return None

    async def close(self) -> None:
        self._close_watchdog()
        await self._close_health()

    async def _open_watchdog(self, place: WatchdogPlace) -> None:
        if self.watchdog is not None and self.watchdog.place == place:
            return
        self._close_watchdog()
        if place is None:
            return
        self.watchdog = await _once_free(
            lambda: Watchdog(*place, self._condition), TimerFileInUseError
        )

    def _close_watchdog(self) -> None:
        if self.watchdog is not None:
            self.watchdog.close()
            self.watchdog = None

    async def _open_health(self, port: int | None) -> None:
        if self._health is not None and self._health_port_wanted == port:
            return
        await self._close_health()
        if port is not None:
            self._beat()
            self._health = await _once_free(
                lambda: HealthServer(self._ip, port, self._condition.describe), HealthPortInUseError
            )
            self._health_port_wanted = port

    async def _close_health(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        health, self._health = self._health, None
        if health is not None:
            await asyncio.to_thread(health.close)

    def _beat(self) -> None:
        self._condition.beat_at = time.monotonic()
        self._beating = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)


async def _once_free(make: Callable[[], T], in_use: type[Exception]) -> T:
    """Make a service. An agent of the launch before may still be about to leave its place."""
    gives_up_at = time.monotonic() + _IN_USE_S
    while True:
        try:
            return make()
        except in_use:
            if time.monotonic() > gives_up_at:
                raise
        await asyncio.sleep(0.05)
