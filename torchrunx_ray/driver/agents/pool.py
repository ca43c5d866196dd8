"""The driver's handles of agents, and the pool of agents that rest between runs."""

import asyncio
import contextlib
import enum
import logging
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from torchrunx_ray.agent.actor import VALUES
from torchrunx_ray.agent.actor import Agent as _AgentActor
from torchrunx_ray.driver.call import references
from torchrunx_ray.driver.call.template_wanted import differences
from torchrunx_ray.driver.cluster.clean_up import clean_up, in_background
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection, untyped_ray
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.wire.messages import Met, TemplateWanted

logger = logging.getLogger("torchrunx_ray")

NAMESPACE = "torchrunx_ray"

_MOST_WORKERS = 1000
"""Limit of workers on one host, since each worker needs a waiting call for its value.

This is Ray's own limit for an async actor.
"""

_MOST_RESTING = 8
"""Limit of resting agents on one node. Each keeps the memory of its template.

Different environments need different templates.
"""

_CLOSING_S = 15.0
"""Time for an agent to end its processes. An agent that takes longer is frozen or cut off."""

_CLOSING_UNMET_S = 1.0
"""The same for an agent that has never answered: Ray may still make its runtime_env."""

_SILENT_S = 10.0
"""Time without an answer before a resting agent is checked. It may be sourcing its env_file again."""

_READY_S = 300.0
"""Limit of the whole time that a resting agent takes to be ready, while it answers other calls."""

_ANSWER_S = 5.0
"""Time for a living agent to answer a simple call."""

_NEVER_READY = (
    "answers, but was not ready after {:g} s: its old template does not end, or a new template cannot be started. "
    "Does a file system hang on that host, such as the file system of the env_file?"
)

_NO_ANSWER = "does not answer: the machine is too busy to run the agent, or is swapping, or the agent is frozen or cut off."

_RUNTIME_ENV_S = 600.0
"""Longest time that Ray takes for a runtime_env, unless its config says otherwise."""

_START_S = 300.0
"""Time for Ray to start an agent's process after its runtime_env is made."""


class AgentState(enum.Enum):
    """States of an agent, as its driver knows them."""

    NEW = "has never answered"
    MET = "has answered"
    GONE = "is dead, frozen or cut off: a call would wait for seconds without an answer"


@dataclass(eq=False)
class PooledAgent:
    """A living agent actor. `calls` is the actor's handle."""

    node_id: str
    wanted: TemplateWanted
    runtime_env: str
    calls: Any
    connection: Connection
    starts_within_s: float | None
    state: AgentState = AgentState.NEW
    claims: int = 0
    """Number of runs that have claimed the agent."""
    met_at: float = -math.inf
    """Time of the answer to the last claim, on the driver's monotonic clock. The claim arrived before that."""
    fault: str = ""
    """Reason why a resting agent was given up, as the rest of a sentence about the agent."""
    rests_until: float = 0
    ahead_ns: int = 0
    """Lead of the host's clock over the driver's, once `clocks.compare` has asked for it."""
    keeps_call_of: str = ""
    """The run whose function and arguments the agent has received, and keeps until the run's last attempt."""
    compared_at: float = -math.inf
    """Time of the last comparison, on the driver's monotonic clock."""

    def on_ours(self, time_ns: int) -> int:
        """Return a time of the host on the driver's clock."""
        return time_ns - self.ahead_ns

    async def meet(self, *, listen: bool, health_port: int | None = None) -> Met | None:
        """Claim the agent for a run. Returns None if the agent ended or froze while it rested.

        Raises RayError or TimeoutError if a new agent did not start.
        """
        self.claims += 1
        is_new = self.state is AgentState.NEW
        asking = self.connection.ask(self.calls.meet, self.claims, listen, health_port)
        meeting = asyncio.create_task(asking)
        try:
            await (self._until_met(meeting) if is_new else self._until_met_or_frozen(meeting))
            met: Met = meeting.result()
        except (RayError, TimeoutError):
            if is_new:
                raise
            return None
        finally:
            meeting.cancel()
            del meeting  # an exception refers to this frame, and must not wait for Python's gc
        self.met_at = time.monotonic()
        if is_new:
            self.state = AgentState.MET
        return None if met.leaving else met

    async def _until_met(self, meeting: "asyncio.Task[Any]") -> None:
        await asyncio.wait({meeting}, timeout=self.starts_within_s)
        if not meeting.done():
            self.state = AgentState.GONE
            raise TimeoutError(
                f"the agent has not answered within {self.starts_within_s:g} s: Ray has not started its process, or "
                "the process is frozen, or cannot be reached"
            )

    async def _until_met_or_frozen(self, meeting: "asyncio.Task[Any]") -> None:
        gives_up_at = time.monotonic() + _READY_S
        while not meeting.done():
            await asyncio.wait({meeting}, timeout=_SILENT_S)
            if meeting.done():
                return
            is_late = time.monotonic() >= gives_up_at
            fault = _NEVER_READY.format(_READY_S) if is_late else ""
            try:
                await self._answer()
            except TimeoutError:
                fault = _NO_ANSWER
            if fault and not meeting.done():
                self.state, self.fault = AgentState.GONE, fault
                raise TimeoutError

    async def _answer(self) -> None:
        """Make a call that a living agent answers at once. Raises RayError or TimeoutError if it does not."""
        async with asyncio.timeout(_ANSWER_S):
            await self.connection.ask(self.calls.clock)

    def forget_call(self) -> None:
        """Let the agent free the function and the arguments of a run that has ended."""
        if self.keeps_call_of and self.state is AgentState.MET:
            self.connection.tell(self.calls.forget_call, self.keeps_call_of)
        self.keeps_call_of = ""

    async def answers(self) -> bool:
        """Return True if the agent lives and answers a simple call."""
        try:
            await self._answer()
        except (RayError, TimeoutError):
            self.state = AgentState.GONE
            return False
        return True

    async def release(self, linger: float) -> None:
        """Let the agent rest for the next launch.

        Ends the agent instead if `linger` is 0, if the agent has never answered or is gone, or if the
        driver has left its cluster.
        """
        if linger <= 0 or self.state is not AgentState.MET or not self.connection.is_ours():
            await self.end()
            return
        self.connection.tell(self.calls.rest, self.claims, linger)
        self.rests_until = time.monotonic() + linger
        _resting.append(self)
        there = [agent for agent in _still_resting() if agent.node_id == self.node_id]
        for surplus in there[:-_MOST_RESTING]:  # those that have rested longest
            _resting.remove(surplus)
            in_background(surplus.end(), "an idle agent could not be ended: %s")

    async def end(self) -> None:
        """Wait until the agent's processes are gone. The actor itself ends a moment later."""
        if not self.connection.is_ours():
            return  # Ray has ended it with this driver's other actors
        # If the agent cannot end its processes, its keeper and template do so when it is killed.
        with contextlib.suppress(RayError, TimeoutError, ClusterLeft):
            if self.state is not AgentState.GONE:
                closing_s = _CLOSING_UNMET_S if self.state is AgentState.NEW else _CLOSING_S
                async with asyncio.timeout(closing_s):
                    await self.connection.ask(self.calls.close)
        await clean_up(self._kill(), "ending an agent")

    async def _kill(self) -> None:
        await self.connection.call(untyped_ray.kill, self.calls)


_resting: list[PooledAgent] = []
"""Agents that wait for another run of this driver. Used only in the background loop."""


def _still_resting() -> list[PooledAgent]:
    """Forget the agents that have left, and return the others, first those that have rested longest."""
    now = time.monotonic()
    _resting[:] = [
        agent for agent in _resting if agent.rests_until > now and agent.connection.is_ours()
    ]
    return _resting


async def acquire(node: Node, label: str, wanted: TemplateWanted, options: Options) -> PooledAgent:
    """Return the fitting agent on the node that has rested least, whose memory is warmest, or a new agent."""
    runtime_env = repr(options.runtime_env)
    found: list[list[str]] = []
    for agent in reversed(_still_resting()):
        if agent.node_id != node.node_id:
            continue
        if (agent.wanted, agent.runtime_env) == (wanted, runtime_env):
            _resting.remove(agent)
            return agent
        other = [] if agent.runtime_env == runtime_env else ["runtime_env"]
        found.append(differences(wanted, agent.wanted) + other)
    if nearest := min(found, key=len, default=None):
        logger.info(
            "starting a new template on %s, because no warm template fits. The most similar one differs in: %s",
            label,
            "; ".join(nearest),
        )
    connection = Connection()
    calls = await connection.call(_create, node, wanted, options)
    starts_within_s = _starts_within_s(options.runtime_env or {})
    return PooledAgent(node.node_id, wanted, runtime_env, calls, connection, starts_within_s)


def _starts_within_s(runtime_env: Mapping[str, Any]) -> float | None:
    config: Mapping[str, Any] = runtime_env.get("config") or {}
    runtime_env_s: float = config.get("setup_timeout_seconds", _RUNTIME_ENV_S)
    return None if runtime_env_s < 0 else runtime_env_s + _START_S


def _create(node: Node, wanted: TemplateWanted, options: Options) -> Any:
    """Create an agent actor that is named after its node.

    Ray shows the name while the agent lives. The agent may serve several runs, which may label the host differently.
    """
    groups = {VALUES: _MOST_WORKERS}
    actor_class: Any = untyped_ray.remote(concurrency_groups=groups)(_AgentActor)
    unique = f"agent-{node.hostname}-{uuid.uuid4().hex[:8]}"
    calls = actor_class.options(
        num_cpus=0,
        name=unique,
        namespace=NAMESPACE,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        runtime_env=dict(options.runtime_env) if options.runtime_env else None,
    ).remote(unique, wanted)
    references.are_packed(calls)
    return calls
