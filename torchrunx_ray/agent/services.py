"""Services of an agent that a run claims: the watchdog's FIFO and the port of the health checks."""

import asyncio
import time
from pathlib import Path

from torchrunx_ray.agent.condition import Condition
from torchrunx_ray.agent.health import HealthPortError, HealthServer
from torchrunx_ray.agent.timer_file import TimerFileError, TimerFileInUseError
from torchrunx_ray.agent.watchdog import Watchdog

_BEAT_S = 0.5
"""Interval at which the agent's event loop shows that it runs, for the health checks."""


_IN_USE_S = 1.0
"""Time for another agent to leave a FIFO whose path the user chose."""

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
            self._open_health(health_port)
        except (TimerFileError, HealthPortError) as error:
            self.close()
            return str(error)
        return None

    def close(self) -> None:
        self._close_watchdog()
        self._close_health()

    async def _open_watchdog(self, place: WatchdogPlace) -> None:
        """Listen at this place. An agent of the launch before may still be about to leave it."""
        if self.watchdog is not None and self.watchdog.place == place:
            return
        self._close_watchdog()
        if place is None:
            return
        gives_up_at = time.monotonic() + _IN_USE_S
        while self.watchdog is None:
            try:
                self.watchdog = Watchdog(*place, self._condition)
            except TimerFileInUseError:
                if time.monotonic() > gives_up_at:
                    raise
                await asyncio.sleep(0.05)

    def _close_watchdog(self) -> None:
        if self.watchdog is not None:
            self.watchdog.close()
            self.watchdog = None

    def _open_health(self, port: int | None) -> None:
        if self._health is not None and self._health_port_wanted == port:
            return
        self._close_health()
        if port is not None:
            self._beat()
            self._health = HealthServer(self._ip, port, self._condition.describe)
            self._health_port_wanted = port

    def _close_health(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        if self._health is not None:
            self._health.close()
            self._health = None

    def _beat(self) -> None:
        self._condition.beat_at = time.monotonic()
        self._beating = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)
