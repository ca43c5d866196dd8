"""One host's share of an attempt, as the driver knows it."""

import asyncio
import contextlib
import enum
from collections.abc import Coroutine
from typing import Any

import ray
from ray.exceptions import RayError

from torchrunx_ray.driver.agents.pool import AgentState, PooledAgent
from torchrunx_ray.driver.cluster.connection import ClusterLeft
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.stop_board import StopReason


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


class End(enum.Enum):
    """Knowledge of the end of a share's processes, which must not live beside those of another attempt."""

    UNKNOWN = "nothing: the agent may be frozen, cut off or ending"
    NOT_KILLED = "SIGKILL did not end some processes"
    REPORTED = "the agent has reported that no process is left"
    WITH_AGENT = "the agent's process is gone, and its keepers end all processes with it"
    LEASE_OVER = "the lease of the workers has run out, so their keepers have ended them"


class Share:
    """One host's share of an attempt: its state, its workers, and the calls to its agent.

    A share refers neither to its attempt nor to finished tasks. It would otherwise keep the values until Python's
    gc runs.
    """

    def __init__(
        self,
        index: int,
        label: str,
        agent: PooledAgent,
        attempt: messages.AttemptId,
    ) -> None:
        self.index = index
        self.label = label
        self.agent = agent
        self.state = ShareState.STARTING
        self.ranks_by_pid: dict[int, int] = {}
        self.values: list[ray.ObjectRef[Any]] = []
        """References to the values by local rank, once the link has ended."""
        self._attempt = attempt
        self._watching: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._stop_reason: StopReason | None = None
        """Reason of the last request to the function, which the order to stop repeats in case it arrives first."""
        self.end = End.UNKNOWN
        self.is_deaf = False
        """True if the agent has not answered the last call to stop its workers."""

    @property
    def is_broken(self) -> bool:
        """True if the agent cannot be used again: it has not sent all its output, or it ends itself."""
        return self.state is not ShareState.DONE or self.agent.state is AgentState.GONE

    @property
    def is_over(self) -> bool:
        """True if no worker lives, or if nothing more can be heard of the workers."""
        return self.state >= ShareState.OVER

    @property
    def is_watched(self) -> bool:
        return self._watching is not None and not self._watching.done()

    def become(self, state: ShareState) -> None:
        """Enter a state, unless the share is past it."""
        self.state = max(state, self.state)

    def note_end(self, end: End) -> None:
        """Note the end of the processes, unless it is known already."""
        if self.end is End.UNKNOWN:
            self.end = end

    def watch(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Begin the work that lasts as long as the link."""
        self._watching = asyncio.create_task(work)
        return self._watching

    def ask_to_stop(self, reason: StopReason, within_s: float | None) -> None:
        """Pass a request to the function on to the agent."""
        if self._asking is not None:
            self._asking.cancel()
        self._stop_reason = reason
        self._asking = asyncio.create_task(self._tell_to_ask(reason, within_s))

    def stop(self, grace_s: float, signum: int) -> None:
        """Tell the agent to stop its workers."""
        if self._stopping is not None:
            self._stopping.cancel()
        self.is_deaf = True
        self._stopping = asyncio.create_task(self._tell_to_stop(grace_s, signum))

    def give_up(self) -> None:
        """Give up the agent, which is ending, frozen or cut off. Ray reports this much later."""
        self.agent.state = AgentState.GONE
        self.close()

    def close(self) -> None:
        for task in (self._watching, self._asking, self._stopping):
            if task is not None:
                task.cancel()
        self._watching = self._asking = self._stopping = None

    async def _tell_to_stop(self, grace_s: float, signum: int) -> None:
        with contextlib.suppress(RayError, ClusterLeft):  # the link reports the reason
            await self.agent.connection.ask(
                self.agent.calls.stop, self._attempt, grace_s, int(signum), self._stop_reason
            )
            self.is_deaf = False

    async def _tell_to_ask(self, reason: StopReason, within_s: float | None) -> None:
        with contextlib.suppress(RayError, ClusterLeft):  # the link reports the reason
            await self.agent.connection.ask(
                self.agent.calls.ask_to_stop, self._attempt, reason, within_s
            )
