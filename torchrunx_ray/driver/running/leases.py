"""The leases of an attempt's hosts, as the driver counts them.

A host that has no contact with the driver ends its workers when its lease runs out. The driver starts workers
elsewhere only after that.
"""

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from ray.exceptions import RayError

from torchrunx_ray.driver.agents import pulses
from torchrunx_ray.driver.agents.pool import AgentState, PooledAgent
from torchrunx_ray.driver.agents.pulses import PulseLink, PulseLost
from torchrunx_ray.driver.cluster.connection import ClusterLeft, is_remote_client
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.wire.messages import AttemptId, LeasesWanted

logger = logging.getLogger("torchrunx_ray")

FIRST_S = 120.0
"""Time of the first lease from the begin of the attempt. It comes with the host's share, before any pulse is needed."""

_UNTIL_RENEWED_S = 10.0
"""Time by which the first lease is longer than the others if there is a pulse already, which renews it at once."""

_MARGIN_S = 1.0
"""Time for a keeper to wake up and kill. It also covers clocks that run at different speeds."""

_NEEDED_AFTER_S = 20.0
"""Time after which an attempt that still starts needs a pulse."""

_AFTER_START_S = 0.3
"""Time after the start of all workers until the attempt takes a pulse, which costs CPU."""

_WATCHED_FOR = 0.2
"""Time of one question to the pulse, as a part of a lease. A pulse that does not answer is replaced in time."""

_ENDLESS_S = 1e6
"""Stands for leases whose end is unknown."""

_TRIES = 2
"""Attempts to start a pulse for hosts that have their first leases. They end before these leases do."""

_QUIET_S = 2.0
"""Time to wait for the end of a lease without a warning."""

_BEYOND_GRACE_S = 10.0
"""Time by which a lease through ray:// is longer than the interruption that Ray allows."""


def lease_s(options: Options) -> float:
    """Return the time of a lease. Through ray://, Ray itself allows an interruption of a certain time."""
    if not is_remote_client():
        return options.host_timeout
    grace_s = float(os.environ.get("RAY_CLIENT_RECONNECT_GRACE_PERIOD") or 30)
    return max(options.host_timeout, grace_s + _BEYOND_GRACE_S)


class Leases:
    """Keeps the driver's pulse at work for an attempt, and knows whose lease must have run out.

    All times are on the driver's monotonic clock.
    """

    def __init__(self, attempt: AttemptId, crew: Crew, lease_s: float) -> None:
        self.lease_s = lease_s
        self._attempt = attempt
        self._crew = crew
        self._pulse: PulseLink | None = None
        """The pulse that may have granted leases, or the last one."""
        self._over: set[int] = set()
        """Hosts whose lease has run out."""
        self._begun_at = time.monotonic()
        self._has_pulse = pulses.is_at_hand()
        self._first_s = lease_s + _UNTIL_RENEWED_S if self._has_pulse else FIRST_S
        self._over_at = self._begun_at + self._first_s + _MARGIN_S
        """Time at which all leases have run out that the current pulse has not granted. Infinite if unknown."""
        self._are_needed = asyncio.Event()
        self._fences: dict[int, asyncio.Task[bool]] = {}
        """Waits for the ends of the leases of hosts that get no more, by host index."""
        self._ends_at: dict[int, float] = {}
        """Times of these ends, as far as they are known."""

    @property
    def longest_silence_s(self) -> float:
        """The time after the last sign of a host at which its lease must have run out."""
        return self.lease_s + _MARGIN_S

    @property
    def _refused(self) -> set[int]:
        """Hosts that get no more leases."""
        return {*self._over, *self._fences}

    def first_s(self, agent: PooledAgent) -> float:
        """Return the time of an agent's first lease, which the agent counts from its last claim.

        That was before the attempt: other hosts may have taken minutes to get ready.
        """
        return self._first_s + (self._begun_at - agent.met_at)

    def take_soon(self) -> None:
        """Take a pulse, because all workers have started."""
        asyncio.get_running_loop().call_later(_AFTER_START_S, self._are_needed.set)

    async def hold(self, lose: Callable[[int], None]) -> None:
        """Keep a pulse at work until cancelled.

        `lose` is called with the index of a host whose lease has run out. It is not kept, as it refers to the
        attempt: a cycle would keep the attempt's values until Python's gc runs.
        """
        if not self._has_pulse:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._are_needed.wait(), _NEEDED_AFTER_S)
        with contextlib.suppress(ClusterLeft):  # the links report this
            for _ in range(_TRIES):
                await self._hold_as_long_as_pulses_start(lose)
            self._do_without()

    def refuse(self, host_index: int) -> "asyncio.Task[bool]":
        """Refuse further leases to a host, and begin to wait until the last one must have run out.

        The task returns False if the lease may never run out. It outlives the attempt.
        """
        if host_index not in self._fences:
            self._fences[host_index] = asyncio.create_task(self._fence(host_index))
        return self._fences[host_index]

    def forget(self, host_index: int) -> None:
        """Wait no more for the end of a lease: the workers are known to have ended."""
        if (fence := self._fences.pop(host_index, None)) is not None:
            fence.cancel()

    async def fence(self, host_indices: Iterable[int]) -> bool:
        """Refuse further leases to these hosts, and wait until they must have run out. Return False if they may not."""
        fences = {index: self.refuse(index) for index in host_indices if index not in self._over}
        telling = asyncio.get_running_loop().call_later(_QUIET_S, self._tell_of_wait, fences)
        try:
            return all(await asyncio.gather(*map(asyncio.shield, fences.values())))
        finally:
            telling.cancel()

    def _tell_of_wait(self, host_indices: Iterable[int]) -> None:
        now = time.monotonic()
        left_s = {i: self._ends_at.get(i, now) - now for i in host_indices}
        waiting = {i: s for i, s in left_s.items() if s > 0}
        if waiting:
            logger.warning(
                "%s: waiting for %.0f s, until the workers on %s must have ended",
                self._attempt.run_id,
                max(waiting.values()),
                ", ".join(self._crew.hosts[i].label for i in waiting),
            )

    async def _hold_as_long_as_pulses_start(self, lose: Callable[[int], None]) -> None:
        """Replace a pulse that is lost. Return when a new one does not answer."""
        has_begun = True
        while has_begun:
            has_begun = False
            try:
                self._pulse = await pulses.acquire()
                await self._pulse.begin(self._wanted())
                has_begun = True
                await self._follow(self._pulse, lose)
            except PulseLost as lost:
                self._note_end(lost)
            except RayError as error:  # Ray could not create the actor
                logger.debug("no pulse: %s", error)

    def _wanted(self) -> LeasesWanted:
        return LeasesWanted(
            attempt=self._attempt,
            hosts=len(self._crew.agents),
            lease_s=self.lease_s,
            margin_s=_MARGIN_S,
            until_over_s=min(self._over_at - time.monotonic(), _ENDLESS_S),
            refused=tuple(self._refused),
        )

    async def _follow(self, pulse: PulseLink, lose: Callable[[int], None]) -> NoReturn:
        """Let the hosts renew with this pulse, and report those that do not. Raises PulseLost."""
        for index, agent in enumerate(self._crew.agents):
            if index not in self._refused and agent.state is not AgentState.GONE:
                renew_with = agent.calls.renew_with
                agent.connection.tell(renew_with, self._attempt, pulse.calls, index, self.lease_s)
        while True:
            within_s = self.lease_s * _WATCHED_FOR
            for index in await pulse.watch(self._attempt, tuple(self._over), within_s):
                self._over.add(index)
                lose(index)

    def _note_end(self, lost: PulseLost) -> None:
        ended_at = math.inf if lost.ended_at is None else lost.ended_at
        self._over_at = max(self._over_at, ended_at + self.lease_s + _MARGIN_S)

    def _do_without(self) -> None:
        """Let the workers live without leases, rather than lose them for want of a pulse."""
        logger.warning(
            "%s: Ray has not started the actor that watches this driver for the other hosts. The run goes on, but "
            "will not be restarted if a host is silent.",
            self._attempt.run_id,
        )
        self._over_at = math.inf
        self._pulse = None
        for index, agent in enumerate(self._crew.agents):
            if index not in self._refused and agent.state is not AgentState.GONE:
                agent.connection.tell(agent.calls.need_no_lease, self._attempt)

    async def _fence(self, host_index: int) -> bool:
        over_at = self._over_at
        if self._pulse is not None:
            try:
                left_s = await self._pulse.revoke(self._attempt, host_index)
            except PulseLost as lost:
                self._note_end(lost)
                over_at = self._over_at
            except ClusterLeft:
                return False  # nobody answers any more
            else:
                now = time.monotonic()
                # A pulse that does not know the attempt has granted nothing.
                over_at = max(now, over_at) if left_s is None else now + left_s
        left_s = over_at - time.monotonic()
        if left_s >= _ENDLESS_S / 2:
            return False
        self._ends_at[host_index] = over_at
        await asyncio.sleep(left_s)
        return True
