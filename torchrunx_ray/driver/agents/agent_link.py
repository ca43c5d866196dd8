"""The driver's link to one agent during a run."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from torchrunx_ray.driver.agents.pool import AgentState, PooledAgent
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster import memory_monitor
from torchrunx_ray.driver.cluster.connection import ClusterLeft
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.report.failures import ArgumentLost
from torchrunx_ray.wire import foreign_errors, messages
from torchrunx_ray.wire.clock import now_ns

logger = logging.getLogger("torchrunx_ray")

_SILENT_S = 15.0
"""Time without an answer before a warning. An agent answers every poll within 5 s."""


class AgentLink:
    """Link to one agent: starts its workers, receives its events, and asks for the values."""

    def __init__(
        self,
        agent: PooledAgent,
        hostname: str,
        logs: RunLogs,
        ranks_by_pid: Mapping[int, int],
        hear: Callable[[messages.Event], None],
    ) -> None:
        self._agent = agent
        self._hostname = hostname
        self._logs = logs
        self._ranks_by_pid = ranks_by_pid
        self._hear = hear
        self._cluster = agent.connection
        self.has_agent_died = False
        """True if Ray knows that the agent's process is gone, and not only that it does not answer."""
        self.values: list[ray.ObjectRef[Any]] = []
        """References to the values by local rank, once the workers have been started."""

    async def hold(
        self, wanted: messages.ShareWanted, call: Call
    ) -> messages.AgentFailed | ArgumentLost | None:
        """Wait until the host has ended the run. Returns the failure if the link broke before that."""
        starting = asyncio.create_task(self._start(wanted, call))
        # Polls begin at once: otherwise the last events of an agent that fails while it starts are lost.
        hearing = asyncio.create_task(self._hear_until_ended(wanted.worker.attempt))
        try:
            await asyncio.gather(starting, hearing)  # raises the first error
        except ClusterLeft as left:
            return _failed(str(left), "")
        except RayTaskError as error:
            if (lost := foreign_errors.lost_argument(str(error))) is not None:
                return ArgumentLost(lost)
            return _failed("the agent failed (a limit of the host, or a bug)", str(error))
        except OutOfMemoryError as error:
            self._agent.state = AgentState.GONE
            evidence = memory_monitor.evidence(str(error), self._ranks_by_pid)
            return _failed("Ray's memory monitor killed the agent", evidence)
        except RayError as error:
            if isinstance(error, RayActorError):
                self._agent.state = AgentState.GONE
            self.has_agent_died = isinstance(
                error, ActorDiedError
            ) and foreign_errors.says_process_died(str(error))
            return _failed("the agent died", _evidence(error))
        finally:
            starting.cancel()
            hearing.cancel()
            # An exception refers to this frame, and must not wait for Python's gc.
            del starting, hearing
        return None

    async def _start(self, wanted: messages.ShareWanted, call: Call) -> None:
        calls = self._agent.calls
        has_call = self._agent.keeps_call_of == call.run_name
        values = () if has_call else (call.packed, *call.inserted)
        await self._cluster.ask(calls.start, wanted, *values)
        self._agent.keeps_call_of = call.run_name if wanted.worker.may_be_restarted else ""
        self.values = await self._cluster.begin(_ask_for_values, calls, wanted)

    async def _hear_until_ended(self, attempt: messages.AttemptId) -> None:
        while True:
            for told in await self._poll():
                if told.attempt not in (attempt, None):
                    continue
                self._hear(told.event)
                if isinstance(told.event, messages.OutputEnded):
                    return

    async def _poll(self) -> list[messages.Told]:
        """Return the agent's next events. Log a warning if the agent does not answer."""
        silent = asyncio.get_running_loop().call_later(_SILENT_S, self._say_silent)
        has_room = self._logs.has_room
        # Other events must not wait for a terminal that takes no more output.
        nudging = None if has_room else asyncio.create_task(self._nudge())
        try:
            return await self._cluster.ask(self._agent.calls.poll, has_room)
        finally:
            silent.cancel()
            if nudging is not None:
                nudging.cancel()

    async def _nudge(self) -> None:
        """End a poll that did not ask for output as soon as there is room for output."""
        await self._logs.until_room()
        self._cluster.tell(self._agent.calls.nudge)

    def _say_silent(self) -> None:
        logger.warning(
            "%s has not answered for %.0f s: the machine is too busy to run its agent, or is swapping, or "
            "the agent is frozen or cut off. The run continues when the agent answers. It fails if Ray declares "
            "the node dead.",
            self._hostname,
            _SILENT_S,
        )


def _ask_for_values(calls: Any, wanted: messages.ShareWanted) -> "list[ray.ObjectRef[Any]]":
    return [calls.value.remote(wanted.worker.attempt, place.local_rank) for place in wanted.places]


def _evidence(error: RayError) -> str:
    if not isinstance(error, ActorUnavailableError):
        return str(error)
    # If only the agent died, its raylet reports the death within milliseconds.
    return (
        f"{error}\nRay does not say why. The machine or the raylet (Ray's process for the node) may have ended, or "
        "the network may be cut."
    )


def _failed(what: str, evidence: str) -> messages.AgentFailed:
    return messages.AgentFailed(now_ns(), what, evidence)
