"""The Ray actor that grants leases for its driver.

It is a process of its own, since user code may hold the driver's GIL for longer than a lease. It does not wait for
the driver, but looks at the driver's process.
"""

import asyncio
import time
from collections.abc import Sequence

from torchrunx_ray.pulse.driver_process import DriverProcess
from torchrunx_ray.pulse.grants import Grants
from torchrunx_ray.wire.messages import AttemptId, LeasesWanted

_FORGOTTEN_AFTER_S = 3600.0
"""Time without a question after which an attempt is forgotten. Its hosts then get no leases."""


class Pulse:
    """Grants leases while the driver lives and is not stopped."""

    def __init__(self, driver: DriverProcess | None) -> None:
        """Watch this process. Through ray:// there is none; Ray then ends this actor with the driver."""
        self._driver = driver if driver is not None and driver.is_visible else None
        self._grants: dict[AttemptId, Grants] = {}
        self._asked_at: dict[AttemptId, float] = {}

    def __repr__(self) -> str:
        """Return the name that Ray puts before the actor's own lines and shows in its dashboard."""
        return "torchrunx_ray pulse"

    async def answer(self) -> None:
        """Show that this actor lives."""

    async def begin(self, wanted: LeasesWanted) -> None:
        """Grant leases to the hosts of an attempt."""
        self._forget_old()
        self._grants[wanted.attempt] = Grants(wanted)
        self._find(wanted.attempt)

    async def renew(self, attempt: AttemptId, host_index: int, is_first: bool) -> bool:
        """Grant a lease to a host; called by its agent. See `Grants`."""
        grants = self._grants.get(attempt)
        is_at_work = self._driver is None or self._driver.is_at_work
        return is_at_work and grants is not None and grants.renew(host_index, is_first)

    async def watch(self, attempt: AttemptId, known: Sequence[int], within_s: float) -> list[int]:
        """Return the hosts whose lease must have run out, as soon as there are others than the known ones.

        Return none after `within_s`.
        """
        grants = self._find(attempt)
        ends_at = time.monotonic() + within_s
        while grants is not None:
            over = grants.over(known)
            left_s = ends_at - time.monotonic()
            if over or left_s <= 0:
                return over
            await asyncio.sleep(min(left_s, grants.next_over_s(known)))
        return []

    async def revoke(self, attempt: AttemptId, host_index: int) -> float | None:
        """Grant no more to this host. Return the seconds until its lease must have run out; None if unknown."""
        grants = self._find(attempt)
        return None if grants is None else grants.revoke(host_index)

    def _find(self, attempt: AttemptId) -> Grants | None:
        self._asked_at[attempt] = time.monotonic()
        return self._grants.get(attempt)

    def _forget_old(self) -> None:
        old = time.monotonic() - _FORGOTTEN_AFTER_S
        for attempt in [each for each, at in self._asked_at.items() if at < old]:
            del self._asked_at[attempt]
            self._grants.pop(attempt, None)
