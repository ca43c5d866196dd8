"""The driver's hold on agents, and those that rest between runs."""

import asyncio
import contextlib
import logging
import math
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from torchrunx_ray.agent.actor import VALUES
from torchrunx_ray.agent.actor import Agent as _AgentActor
from torchrunx_ray.driver import references
from torchrunx_ray.driver.connection import ClusterLeft, Connection, untyped_ray
from torchrunx_ray.driver.options import Options
from torchrunx_ray.driver.template_wanted import differences
from torchrunx_ray.wire.messages import Met, TemplateWanted

logger = logging.getLogger("torchrunx_ray")

NAMESPACE = "torchrunx_ray"

_MOST_WORKERS = 1000
"""On one host: so many calls may wait for values; Ray's own bound for an async actor."""

_MOST_RESTING = 8
"""On one node: each keeps the memory of its template, and other environments need other templates."""

_CLOSING_S = 15.0
"""For an agent to end its processes; one that takes longer is frozen, or cut off."""


@dataclass(eq=False)
class Agent:
    """A living agent actor. `calls` is its handle."""

    node_id: str
    wanted: TemplateWanted
    runtime_env: str
    calls: Any
    connection: Connection
    is_new: bool = True
    is_gone: bool = False
    """Dead, frozen or cut off: it would be asked in vain for seconds."""
    rests_until: float = 0
    ahead_ns: int = 0
    """How far its host's clock is before the driver's, once `Clocks` has compared them."""
    compared_at: float = -math.inf
    """By the driver's monotonic clock."""

    async def meet(self, *, listen: bool) -> Met | None:
        """Claim it for a run. None: it ended while it rested; RayError: it never began."""
        try:
            met: Met = await self.connection.ask(self.calls.meet, listen)
        except RayError:
            if self.is_new:
                raise
            return None
        self.is_new = False
        return None if met.leaving else met

    async def release(self, linger: float) -> None:
        """Let it rest, for the next launch to take; with linger=0 end it."""
        if linger <= 0 or not self.connection.is_ours():
            await self.end()
            return
        self.calls.rest.remote(linger)
        self.rests_until = time.monotonic() + linger
        for surplus in _resting.put(self):
            ending = asyncio.create_task(surplus.end())  # another's; nobody waits for it
            _ending.add(ending)
            ending.add_done_callback(_has_ended)

    async def end(self) -> None:
        """Return when the agent's processes are gone. The actor itself goes a moment later."""
        if not self.connection.is_ours():
            return  # Ray has ended it with this driver's other actors
        with contextlib.suppress(ClusterLeft):
            # What it cannot do itself, its keeper and template do when it is killed.
            with contextlib.suppress(RayError, TimeoutError):
                if not self.is_gone:
                    async with asyncio.timeout(_CLOSING_S):
                        await self.connection.ask(self.calls.close)
            await self.connection.call(untyped_ray.kill, self.calls)


class _Resting:
    """Agents that wait for another run of this driver."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agents: list[Agent] = []

    def put(self, agent: Agent) -> list[Agent]:
        """Returns those that have rested longest, where its node has too many."""
        with self._lock:
            self._forget_those_that_left()
            self._agents.append(agent)
            there = [each for each in self._agents if each.node_id == agent.node_id]
            surplus = there[:-_MOST_RESTING]
            self._agents = [each for each in self._agents if each not in surplus]
            return surplus

    def take(self, node_id: str, wanted: TemplateWanted, runtime_env: str) -> Agent | None:
        with self._lock:
            self._forget_those_that_left()
            for agent in self._agents:
                if (agent.node_id, agent.wanted, agent.runtime_env) == (
                    node_id,
                    wanted,
                    runtime_env,
                ):
                    self._agents.remove(agent)
                    return agent
            return None

    def nearest(self, node_id: str, wanted: TemplateWanted, runtime_env: str) -> str | None:
        """Say how the most similar agent of the node differs from what is wanted; None without one."""
        with self._lock:
            self._forget_those_that_left()
            there = [agent for agent in self._agents if agent.node_id == node_id]
        found = [
            differences(wanted, agent.wanted)
            + ([] if agent.runtime_env == runtime_env else ["runtime_env"])
            for agent in there
        ]
        return "; ".join(min(found, key=len)) if found else None

    def _forget_those_that_left(self) -> None:
        now = time.monotonic()
        self._agents = [
            agent
            for agent in self._agents
            if agent.rests_until > now and agent.connection.is_ours()
        ]


_resting = _Resting()

_ending: set[asyncio.Task[None]] = set()


def _has_ended(task: "asyncio.Task[None]") -> None:
    _ending.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.debug("an agent that rested could not be ended: %s", task.exception())


async def acquire(node_id: str, wanted: TemplateWanted, options: Options, name: str) -> Agent:
    """A resting agent of that node and kind, or a new one."""
    runtime_env = repr(options.runtime_env)
    agent = _resting.take(node_id, wanted, runtime_env)
    if agent is None:
        if difference := _resting.nearest(node_id, wanted, runtime_env):
            logger.info(
                "%s: a new template is started, since no warm one fits. The nearest differs in: %s",
                name,
                difference,
            )
        connection = Connection()
        calls = await connection.call(_create, node_id, wanted, options, name)
        agent = Agent(node_id, wanted, runtime_env, calls, connection)
    return agent


def _create(node_id: str, wanted: TemplateWanted, options: Options, name: str) -> Any:
    groups = {VALUES: _MOST_WORKERS}
    actor_class: Any = untyped_ray.remote(concurrency_groups=groups)(_AgentActor)
    unique = f"{name}-{uuid.uuid4().hex[:8]}"
    calls = actor_class.options(
        num_cpus=0,
        name=unique,
        namespace=NAMESPACE,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        runtime_env=dict(options.runtime_env) if options.runtime_env else None,
    ).remote(unique, wanted)
    references.are_packed(calls)
    return calls
