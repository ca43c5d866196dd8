"""A launch's wait for room in the cluster."""

import asyncio
import math
import time
from collections.abc import Sequence

from ray.util.placement_group import PlacementGroup

from torchrunx_ray.driver.cluster import orphans
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import placement_group, queue, reminders
from torchrunx_ray.driver.placing.plan import Plan
from torchrunx_ray.driver.placing.queue import Waiter
from torchrunx_ray.driver.placing.shortage import Shortage
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.errors import PlacementError

_VERDICT_S = 0.05
"""Time after which Ray has decided if the group is possible at all."""

_LOOK_S = 1.0
"""Interval at which a waiting launch checks if it may go on waiting. An autoscaler decides within seconds."""

_QUESTION_S = 10
"""Timeout of one call of `PlacementGroup.wait`, in whole seconds."""


class Waiting:
    """A launch that requests its placement group from Ray, and requests it again when there may be room."""

    def __init__(
        self,
        options: Options,
        plan: Plan,
        connection: Connection,
        progress: Progress,
        name: str,
        waited_s: float,
    ) -> None:
        """`name` is the group's name. `waited_s` is the time spent waiting for nodes that left; it counts towards placement_timeout."""
        self._options = options
        self._plan = plan
        self._connection = connection
        self._progress = progress
        self._name = name
        self._limit_s = math.inf if options.placement_timeout is None else options.placement_timeout
        self._waited_s = waited_s
        self._begun = time.monotonic() - waited_s
        self._group: PlacementGroup | None = None
        self._asking: asyncio.Task[bool] | None = None

    async def until_placed(self, nodes: Sequence[Node]) -> PlacementGroup:
        """Wait until the group is placed, and return it.

        Raises PlacementError if there can be no room, or is none in time. Raises HostLeft if hosts must be
        chosen again.
        """
        with queue.queued(self._plan.needed) as waiter:
            group = self._group or await self._ask_in_turn(waiter, nodes)
            pause_s = _VERDICT_S
            while not await self._is_placed(group, waiter, pause_s):
                if waiter.take():
                    group = await self._ask_anew(group)
                    pause_s = _VERDICT_S
                else:
                    waiter.pass_on()
                    await self._look(group)
                    pause_s = _LOOK_S
            return group

    async def give_up(self) -> None:
        if self._group is not None:
            await placement_group.remove_unplaced(self._group, self._connection)

    async def _ask_in_turn(self, waiter: Waiter, nodes: Sequence[Node]) -> PlacementGroup:
        """Request the group. If it may fit, wait first until Ray's head knows of a recent release."""
        if self._plan.fits_in_sum(nodes):
            await waiter.offered(queue.recent_for_s())
            waiter.take()
        self._begun = time.monotonic() - self._waited_s
        return await self._ask()

    async def _ask(self) -> PlacementGroup:
        name = orphans.group_name(self._name)
        self._group = await placement_group.create(
            self._options, self._plan, name, self._connection
        )
        return self._group

    async def _ask_anew(self, group: PlacementGroup) -> PlacementGroup:
        """Withdraw the group, and request it again: Ray tries a new request at once, but not a waiting group."""
        if not await placement_group.withdraw(group, self._connection):
            return group
        self._group = self._asking = None
        return await self._ask()

    async def _is_placed(self, group: PlacementGroup, waiter: Waiter, timeout_s: float) -> bool:
        """Wait until the group is placed, or there is an offer. Returns True if the group is placed."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._connection.call(group.wait, _QUESTION_S))
            # The group may be removed while this call waits.
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        asking = self._asking
        left_s = max(_VERDICT_S, self._begun + self._limit_s - time.monotonic())
        await waiter.offered(min(timeout_s, left_s), unless=asking)
        if not asking.done():
            return False
        self._asking = None
        try:
            return asking.result()
        except ClusterLeft:
            raise
        except Exception as error:  # Ray has no exception type for this
            self._connection.check()
            raise PlacementError(
                f"Ray no longer knows the launch's placement group (somebody removed the group, or Ray's "
                f"head was restarted): {error}. Launch again."
            ) from None

    async def _look(self, group: PlacementGroup) -> None:
        """Check that waiting is still useful, and report what the launch waits for."""
        self._connection.check()
        now = time.monotonic()
        shortage = await self._checked_shortage(group, now - self._begun)
        if shortage.is_placed:
            return
        self._progress.waiting_for = shortage.in_brief()
        is_early = shortage.is_being_reserved and now - self._begun < reminders.EVERY_S
        if not is_early and reminders.is_due(self._progress.name, shortage.waits_for):
            others = reminders.others_than(self._progress.name)
            shortage.report(self._progress.name, now - self._begun, self._limit_s, others)
            orphans.sweep()

    async def _checked_shortage(self, group: PlacementGroup, waited_s: float) -> Shortage:
        """Return the shortage, or raise its error. A recent release counts as free before the error is raised."""
        shortage = await Shortage.now(group, self._options, self._plan, self._connection)
        if shortage.is_placed:
            return shortage
        try:
            shortage.check(waited_s, self._limit_s)
        except PlacementError:
            if not queue.release_is_recent():
                raise
            await queue.until_head_knows(self._connection)
            shortage = await Shortage.now(group, self._options, self._plan, self._connection)
            shortage.check(waited_s, self._limit_s)
        return shortage
