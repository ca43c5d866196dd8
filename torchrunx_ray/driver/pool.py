"""The driver's hold on agents, and those that rest between runs."""

import asyncio
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from torchrunx_ray.agent.actor import VALUES
from torchrunx_ray.agent.actor import Agent as _AgentActor
from torchrunx_ray.driver import references
from torchrunx_ray.driver.cluster import ClusterLeft, Connection, untyped_ray
from torchrunx_ray.driver.loop import in_thread
from torchrunx_ray.driver.options import Options
from torchrunx_ray.wire.messages import Met, TemplateWanted

NAMESPACE = "torchrunx_ray"

_MOST_WORKERS = 1000
"""On one host: so many calls may wait for values; Ray's own bound for an async actor."""

_CLOSING_S = 15.0
"""For an agent to end its processes; one that takes longer is frozen, or cut off."""


@dataclass
class Agent:
    """A living agent actor. `calls` is its handle."""

    node_id: str
    wanted: TemplateWanted
    runtime_env: str
    calls: Any
    is_new: bool = True
    is_gone: bool = False
    """Ray says so; it would be asked in vain for seconds."""
    rests_until: float = 0
    connection: Connection = field(default_factory=Connection)

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
        _resting.put(self)

    async def end(self) -> None:
        """Return when the agent's processes are gone. The actor itself goes a moment later."""
        if not self.connection.is_ours():
            return  # Ray has ended it with this driver's other actors
        try:
            if not self.is_gone:
                async with asyncio.timeout(_CLOSING_S):
                    await self.connection.ask(self.calls.close)
        except ClusterLeft:
            return
        except (RayError, TimeoutError):
            pass  # what it cannot do itself, its keeper and template do when it is killed
        await in_thread(untyped_ray.kill, self.calls)


class _Resting:
    """Agents that wait for another run of this driver."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agents: list[Agent] = []

    def put(self, agent: Agent) -> None:
        with self._lock:
            self._agents.append(agent)

    def take(self, node_id: str, wanted: TemplateWanted, runtime_env: str) -> Agent | None:
        with self._lock:
            now = time.monotonic()
            self._agents = [
                agent
                for agent in self._agents
                if agent.rests_until > now and agent.connection.is_ours()
            ]
            for agent in self._agents:
                if (agent.node_id, agent.wanted, agent.runtime_env) == (
                    node_id,
                    wanted,
                    runtime_env,
                ):
                    self._agents.remove(agent)
                    return agent
            return None


_resting = _Resting()


async def acquire(node_id: str, wanted: TemplateWanted, options: Options, name: str) -> Agent:
    """A resting agent of that node and kind, or a new one."""
    runtime_env = repr(options.runtime_env)
    agent = _resting.take(node_id, wanted, runtime_env)
    if agent is None:
        calls = await in_thread(_create, node_id, wanted, options, name)
        references.are_packed(calls)
        agent = Agent(node_id, wanted, runtime_env, calls)
    return agent


def _create(node_id: str, wanted: TemplateWanted, options: Options, name: str) -> Any:
    groups = {VALUES: _MOST_WORKERS}
    actor_class: Any = untyped_ray.remote(concurrency_groups=groups)(_AgentActor)
    unique = f"{name}-{uuid.uuid4().hex[:8]}"
    return actor_class.options(
        num_cpus=0,
        name=unique,
        namespace=NAMESPACE,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        runtime_env=dict(options.runtime_env) if options.runtime_env else None,
    ).remote(unique, wanted)
