"""The driver's hold on agents, and those that rest between runs."""

import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from torchrunx_ray.agent.actor import Agent as _AgentActor
from torchrunx_ray.driver import cluster
from torchrunx_ray.driver.cluster import untyped_ray
from torchrunx_ray.driver.loop import in_thread
from torchrunx_ray.driver.options import Options
from torchrunx_ray.wire.messages import TemplateWanted

NAMESPACE = "torchrunx_ray"

_MARGIN_S = 2.0
"""An agent this close to its end is left alone: it may end while we ask it."""


@dataclass
class Agent:
    """A living agent actor. `calls` is its handle."""

    node_id: str
    wanted: TemplateWanted
    runtime_env: str
    calls: Any
    linger: float
    resting_since: float = field(default_factory=time.monotonic)

    @property
    def is_fresh(self) -> bool:
        return time.monotonic() - self.resting_since < self.linger - _MARGIN_S

    async def release(self) -> None:
        """Let the agent rest, for the next launch to take; with linger=0 end it."""
        if self.linger <= 0:
            await self.end()
            return
        self.calls.rest.remote(self.linger)
        self.resting_since = time.monotonic()
        _resting.put(self)

    async def end(self) -> None:
        """Return when the agent's processes are gone. The actor itself goes a moment later."""
        try:
            await self.calls.close.remote()
        except RayError:
            pass  # it is gone, and its template with it
        await in_thread(untyped_ray.kill, self.calls)


class _Resting:
    """Agents that wait for another run of this driver."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agents: list[Agent] = []
        self._cluster: str | None = None

    def put(self, agent: Agent) -> None:
        with self._lock:
            self._forget_other_clusters()
            self._agents.append(agent)

    def take(self, node_id: str, wanted: TemplateWanted, runtime_env: str) -> Agent | None:
        with self._lock:
            self._forget_other_clusters()
            self._agents = [agent for agent in self._agents if agent.is_fresh]
            for agent in self._agents:
                if (agent.node_id, agent.wanted, agent.runtime_env) == (
                    node_id,
                    wanted,
                    runtime_env,
                ):
                    self._agents.remove(agent)
                    return agent
            return None

    def _forget_other_clusters(self) -> None:
        """After ray.shutdown and ray.init the old handles mean nothing."""
        me: str = cluster.context().get_worker_id()
        if me != self._cluster:
            self._cluster = me
            self._agents.clear()


_resting = _Resting()


async def acquire(node_id: str, wanted: TemplateWanted, options: Options, name: str) -> Agent:
    """A resting agent of that node and kind, or a new one."""
    runtime_env = repr(options.runtime_env)
    agent = _resting.take(node_id, wanted, runtime_env)
    if agent is not None:
        agent.linger = options.linger
        return agent
    calls = await in_thread(_create, node_id, wanted, options, name)
    return Agent(node_id, wanted, runtime_env, calls, options.linger)


def _create(node_id: str, wanted: TemplateWanted, options: Options, name: str) -> Any:
    actor_class: Any = untyped_ray.remote(_AgentActor)
    unique = f"{name}-{uuid.uuid4().hex[:8]}"
    return actor_class.options(
        num_cpus=0,
        name=unique,
        namespace=NAMESPACE,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        runtime_env=dict(options.runtime_env) if options.runtime_env else None,
    ).remote(unique, wanted)
