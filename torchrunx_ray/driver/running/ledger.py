"""Failures of an attempt, as they arrive."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Collection

from torchrunx_ray.driver.report.failures import Failure, Report, is_kill
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns

_SETTLING_S = 0.1
"""Time for failures that happened earlier, but arrive later."""

_CAUSE_S = 0.5
"""Further time for the cause of errors in collectives."""


class Ledger:
    """Failures in the order of their arrival."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._failed: list[tuple[int | None, Failure]] = []
        """Each with the index of the host on whose clock its time is; None for the driver's clock."""
        self._before_cancellation: int | None = None
        """Number of failures that were known when the run was cancelled; None if it was not cancelled."""
        self._has_own_cause = asyncio.Event()
        """Set if a worker was killed. Nothing that a peer does ends in a SIGKILL."""
        self.cause_is_known = asyncio.Event()
        """Set if some failure is no error in a collective, or if each rank has failed or returned."""

    def __len__(self) -> int:
        return len(self._failed)

    def add(
        self, host_index: int, local_rank: int | None, time_ns: int | None, report: Report
    ) -> None:
        """Add a failure. Its time is on its host's clock; None means now, on the driver's clock."""
        rank = None if local_rank is None else self._crew.rank(host_index, local_rank)
        label = self._crew.hosts[host_index].label
        whose, time_ns = (None, now_ns()) if time_ns is None else (host_index, time_ns)
        self._failed.append((whose, Failure(time_ns, label, rank, report)))
        if not (isinstance(report, messages.Failed) and report.in_collective):
            self.cause_is_known.set()
        if is_kill(report):
            self._has_own_cause.set()

    def look_for_others(self, finished: Collection[int]) -> None:
        """Stop the wait for a cause if each rank has failed or returned."""
        failed = {failure.rank for _, failure in self._failed}
        if all(place.rank in failed or place.rank in finished for place in self._crew.places):
            self.cause_is_known.set()

    async def settle(self, *, in_haste: bool) -> None:
        """Wait until earlier failures, and the cause of errors in collectives, may have arrived.

        If `in_haste`, do not wait after a worker was killed: its death is a cause.
        """
        if not in_haste:
            await asyncio.sleep(_SETTLING_S)
        elif await _happens(self._has_own_cause, _SETTLING_S):
            return
        await _happens(self.cause_is_known, _CAUSE_S)

    def note_cancellation(self) -> None:
        """Note that later failures may be the consequence of a cancellation."""
        self._before_cancellation = len(self._failed)

    def all(self) -> list[Failure]:
        """Return all failures, with their times on the driver's clock.

        The times are converted late, since the clocks may not have been compared when a failure arrived.
        """
        return [self._on_our_clock(*failure) for failure in self._failed]

    def before_cancellation(self) -> list[Failure]:
        """Return the failures from before the cancellation; all if there was none."""
        return self.all()[: self._before_cancellation]

    def _on_our_clock(self, host_index: int | None, failure: Failure) -> Failure:
        if host_index is None:
            return failure
        time_ns = self._crew.agents[host_index].on_ours(failure.time_ns)
        return dataclasses.replace(failure, time_ns=time_ns)


async def _happens(event: asyncio.Event, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            return await event.wait()
    return False
