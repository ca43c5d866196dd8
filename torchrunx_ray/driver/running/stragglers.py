"""Stacks of a run's workers, and warnings about ranks that run longer than the others."""

import asyncio
import logging
from collections.abc import Iterable

from ray.exceptions import RayError

from torchrunx_ray.driver.agents.pool import AgentState
from torchrunx_ray.driver.cluster.connection import ClusterLeft
from torchrunx_ray.driver.report.stacks import Stacks, in_words
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.wire.messages import AttemptId, StacksWanted

logger = logging.getLogger("torchrunx_ray")

_ASKED = StacksWanted(within_s=2.0, thread_s=1.0)
"""Limits for stacks during a run. A worker's thread gets long: faulthandler may crash a slow worker."""

_ROUND_TRIP_S = 0.1
"""Time for a call and its answer between driver and agent."""

_RETURNED_S = 60.0
"""Time after the last return of a rank until a warning names the others."""


class Stragglers:
    """Asks the agents for stacks, and warns about ranks that go on long after others have returned."""

    def __init__(self, attempt: AttemptId, crew: Crew) -> None:
        self._attempt = attempt
        self._crew = crew
        self._returned: set[int] = set()
        self._saying: asyncio.Task[None] | None = None

    async def stacks(self, wanted: StacksWanted = _ASKED) -> Stacks:
        """Return the stacks of the living workers that answer in time."""
        asked = [
            asyncio.create_task(self._stacks_of(host_index, wanted))
            for host_index, agent in enumerate(self._crew.agents)
            if agent.connection.is_ours() and agent.state is not AgentState.GONE
        ]
        if asked:
            # If a worker does not answer, its agent waits the whole time before it answers.
            await asyncio.wait(asked, timeout=wanted.within_s + _ROUND_TRIP_S)
        stacks: dict[int, str] = {}
        for of_host in asked:
            if of_host.done():
                stacks |= of_host.result()
            else:
                of_host.cancel()
        return Stacks(stacks, self._returned)

    def has_returned(self, rank: int) -> None:
        """Note that a rank has returned, and begin again to wait for the others."""
        self._returned.add(rank)
        self.close()
        self._saying = asyncio.create_task(self._name_others())

    def close(self) -> None:
        """Cancel the warning."""
        if self._saying is not None:
            self._saying.cancel()

    async def _name_others(self) -> None:
        await asyncio.sleep(_RETURNED_S)
        stacks = await self.stacks()
        running = stacks.without(self._returned)
        if running:
            _warn(self._returned, "these ranks are still running", running)
        elif stacks:
            _warn(self._returned, "the launch waits for their processes to end", stacks)

    async def _stacks_of(self, host_index: int, wanted: StacksWanted) -> dict[int, str]:
        """Return a host's stacks by rank; none if its agent cannot be called, which is reported elsewhere."""
        agent = self._crew.agents[host_index]
        try:
            texts: dict[int, str] = await agent.connection.ask(
                agent.calls.stacks, self._attempt, wanted
            )
        except (RayError, ClusterLeft):
            return {}
        return {self._crew.rank(host_index, k): text for k, text in texts.items()}


def _warn(returned: Iterable[int], what: str, stacks: Stacks) -> None:
    logger.warning(
        "%s returned at least %.0f s ago; %s:\n%s",
        in_words(returned),
        _RETURNED_S,
        what,
        stacks.summary,
    )
