"""One host's share of an attempt, as the driver knows it."""

import asyncio
import contextlib
import enum
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from ray.exceptions import RayError

from torchrunx_ray.driver.agents.agent_link import AgentLink
from torchrunx_ray.driver.agents.pool import AgentState, PooledAgent
from torchrunx_ray.driver.cluster.connection import ClusterLeft
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.wire import messages


class ShareState(enum.IntEnum):
    """States of a share. A share may skip states, and never goes back."""

    STARTING = 1
    """No worker can be forked yet."""
    READY = 2
    """Workers can be forked, or are."""
    OVER = 3
    """No worker lives, and the last output is on its way."""
    LOST = 4
    """The link ended before all output had arrived, so the agent cannot be used again."""
    DONE = 5
    """All output has arrived."""


class Share:
    """One host's share of an attempt: its state, its workers, and the link to its agent."""

    def __init__(
        self,
        index: int,
        label: str,
        agent: PooledAgent,
        attempt: messages.AttemptId,
        logs: RunLogs,
        hear: Callable[["Share", messages.Event], None],
    ) -> None:
        self.index = index
        self.label = label
        self.agent = agent
        self.state = ShareState.STARTING
        self.ranks_by_pid: dict[int, int] = {}
        self.link = AgentLink(
            agent, label, logs, self.ranks_by_pid, lambda event: hear(self, event)
        )
        self._attempt = attempt
        self._watching: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[bool] | None = None

    @property
    def is_over(self) -> bool:
        """True if no worker lives, or if nothing more can be heard of the workers."""
        return self.state >= ShareState.OVER

    @property
    def is_watched(self) -> bool:
        return self._watching is not None and not self._watching.done()

    @property
    def values(self) -> "list[ray.ObjectRef[Any]]":
        """References to the values by local rank."""
        return self.link.values

    @property
    def is_deaf(self) -> bool:
        """True if the agent has not answered the last call to stop its workers."""
        told = self._stopping
        has_answered = told is not None and told.done() and not told.cancelled() and told.result()
        return told is not None and not has_answered

    def become(self, state: ShareState) -> None:
        """Enter a state, unless the share is past it."""
        self.state = max(state, self.state)

    def watch(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Begin the work that lasts as long as the link."""
        self._watching = asyncio.create_task(work)
        return self._watching

    def stop(self, grace_s: float) -> None:
        """Tell the agent to stop its workers."""
        if self._stopping is not None:
            self._stopping.cancel()
        self._stopping = asyncio.create_task(self._tell_to_stop(grace_s))

    def give_up(self) -> None:
        """Give up the agent, which is ending, frozen or cut off. Ray reports this much later."""
        self.agent.state = AgentState.GONE
        self.close()

    def close(self) -> None:
        for task in (self._watching, self._stopping):
            if task is not None:
                task.cancel()

    async def _tell_to_stop(self, grace_s: float) -> bool:
        """Return True if the agent has answered."""
        with contextlib.suppress(RayError, ClusterLeft):  # the link reports the reason
            await self.agent.connection.ask(self.agent.calls.stop, self._attempt, grace_s)
            return True
        return False
