"""The lease of an attempt on this host."""

import asyncio
import contextlib
import enum
from typing import Any

from ray.exceptions import RayError

from torchrunx_ray.agent.held_lease import HeldLease
from torchrunx_ray.agent.template import Template
from torchrunx_ray.wire.clock import boot_ns
from torchrunx_ray.wire.messages import AttemptId

_EVERY_S = 1.0
"""Interval of the requests."""

_AT_FIRST_S = 0.2
"""The same while the first lease is in force, which is long. The request after that tells the pulse of the new one."""

_FIRST_WITHIN_S = 60.0
"""Time to wait for a first renewal if the first lease ran out before the host could fork."""

_KEEPERS_S = 0.5
"""Time for the keepers to end the template, before the agent itself ends it. The driver allows for a second."""

_NS = 10**9


class LeaseState(enum.Enum):
    """States of a lease."""

    WANTED = "no worker may be forked yet"
    FIRST = "the time was given with the host's share"
    RENEWED = "the time was given by the pulse"
    NOT_NEEDED = "the workers live without one"
    OVER = "the host's share has ended, or the lease ran out"


class HostLease:
    """Renews the lease every second, and counts its time from the moment of each request.

    So a late answer extends nothing, and the lease never lasts longer than the driver believes.
    """

    def __init__(self, attempt: AttemptId, template: Template, claimed_at_ns: int) -> None:
        self.attempt = attempt
        self._template = template
        self._held: HeldLease = template.lease
        self._held.contact_at_ns = claimed_at_ns
        self._state = LeaseState.WANTED
        self._is_decided = asyncio.Event()
        """Set once there is a lease, or will be none."""
        self._renewing: asyncio.Task[None] | None = None
        self._hanging_up: asyncio.Task[None] | None = None
        """Waits until the lease has run out."""
        self._requests: set[asyncio.Task[None]] = set()

    @property
    def _has_run_out(self) -> bool:
        return 0 < self._held.expires_at_ns <= boot_ns()

    @property
    def _may_extend(self) -> bool:
        is_on = self._state not in (LeaseState.NOT_NEEDED, LeaseState.OVER)
        return is_on and not self._has_run_out

    @property
    def is_decided(self) -> bool:
        """True if `is_held` answers at once."""
        return self._is_decided.is_set()

    def begin(self, first_s: float) -> None:
        """Take the first lease, which answers the last claim, unless it came too late or was renewed already."""
        expires_at_ns = self._held.contact_at_ns + int(first_s * _NS)
        if self._state is LeaseState.WANTED and expires_at_ns > boot_ns():
            self._take(LeaseState.FIRST, expires_at_ns)

    def renew_with(self, pulse: Any, host_index: int, lease_s: float) -> None:
        """Send requests to this pulse from now on."""
        if self._may_extend:
            self._renew_no_more()
            self._renewing = asyncio.create_task(self._renew_often(pulse, host_index, lease_s))

    async def is_held(self) -> bool:
        """Wait until the host may fork workers. Return False if the lease has run out, or nobody grants one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_WITHIN_S):
                await self._is_decided.wait()
        return self._state not in (LeaseState.WANTED, LeaseState.OVER) and not self._has_run_out

    def give_up(self) -> None:
        """Let the workers live without a lease, because there is no pulse."""
        if self._may_extend:
            self._stop_tasks()
            self._take(LeaseState.NOT_NEEDED, 0)

    def end(self) -> None:
        """Give the lease back, because no worker lives."""
        if self._state is not LeaseState.OVER:
            self._note_end()
            self._held.clear()
        self._stop_tasks()

    async def _renew_often(self, pulse: Any, host_index: int, lease_s: float) -> None:
        while not self._has_run_out:
            # An answer may be lost, or late, and must not delay the next request.
            is_first = self._state is not LeaseState.RENEWED
            request = asyncio.create_task(self._renew(pulse, host_index, lease_s, is_first))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
            await asyncio.sleep(_AT_FIRST_S if is_first else _EVERY_S)

    async def _hang_up_once_over(self) -> None:
        """End the template some time after its lease ran out, in case both keepers were killed."""
        while (left_ns := self._held.expires_at_ns - boot_ns()) > 0:
            await asyncio.sleep(min(_EVERY_S, left_ns / _NS))
        self._note_end()
        await asyncio.sleep(_KEEPERS_S)
        self._template.hang_up()

    async def _renew(self, pulse: Any, host_index: int, lease_s: float, is_first: bool) -> None:
        asked_at_ns = boot_ns()
        try:
            is_granted = await pulse.renew.remote(self.attempt, host_index, is_first)
        except RayError:
            return  # another request follows, perhaps to another pulse
        if is_granted and self._may_extend:
            self._extend(asked_at_ns, asked_at_ns + int(lease_s * _NS))

    def _extend(self, asked_at_ns: int, expires_at_ns: int) -> None:
        """Take a renewal. The first one makes the time shorter.

        An answer that was overtaken changes nothing. Nor does one that comes after its own end: another may follow.
        """
        is_overtaken = expires_at_ns <= self._held.expires_at_ns
        if expires_at_ns <= boot_ns() or (self._state is LeaseState.RENEWED and is_overtaken):
            return
        self._held.contact_at_ns = asked_at_ns
        self._take(LeaseState.RENEWED, expires_at_ns)

    def _take(self, state: LeaseState, expires_at_ns: int) -> None:
        self._state = state
        self._held.set(expires_at_ns)
        self._is_decided.set()
        if self._hanging_up is None and state is not LeaseState.NOT_NEEDED:
            self._hanging_up = asyncio.create_task(self._hang_up_once_over())

    def _note_end(self) -> None:
        self._state = LeaseState.OVER
        self._is_decided.set()

    def _stop_tasks(self) -> None:
        self._renew_no_more()
        if self._hanging_up is not None:
            self._hanging_up.cancel()

    def _renew_no_more(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        for request in self._requests:
            request.cancel()


class LeaseOfClaim:
    """The lease of the attempt for which the agent was claimed.

    Ray may deliver an order about a lease before its attempt begins here, or after another one has begun.
    """

    def __init__(self) -> None:
        self._claimed_at_ns = 0
        """Time at which the newest claim arrived, on the clock of leases."""
        self._begun: AttemptId | None = None
        """The attempt that has begun under the newest claim."""
        self._lease: HostLease | None = None

    def claim(self) -> None:
        """Begin a claim, from which the first lease counts."""
        self.end()
        self._claimed_at_ns = boot_ns()

    def begin(
        self, attempt: AttemptId, template: Template, first_s: float | None
    ) -> HostLease | None:
        """Begin an attempt, and return its lease; None if it needs none, without a time for the first one."""
        self._begun = attempt
        if first_s is None:
            self._end_lease()
            return None
        lease = self._lease_of(attempt, template)
        lease.begin(first_s)
        return lease

    def of(self, attempt: AttemptId, template: Template) -> HostLease | None:
        """Return the lease of an attempt, which may not have begun yet; None if another one has begun."""
        if self._begun not in (None, attempt):
            return None
        return self._lease_of(attempt, template)

    def end(self) -> None:
        """End the claim with its lease."""
        self._begun = None
        self._end_lease()

    def _lease_of(self, attempt: AttemptId, template: Template) -> HostLease:
        if self._lease is None or self._lease.attempt != attempt:
            self._end_lease()
            self._lease = HostLease(attempt, template, self._claimed_at_ns)
        return self._lease

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.end()
            self._lease = None
