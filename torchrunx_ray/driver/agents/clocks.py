"""Offsets between the clocks of the hosts, used to order events of different hosts."""

import asyncio
import time
from collections.abc import Sequence

from ray.exceptions import RayError

from torchrunx_ray.driver.agents.pool import PooledAgent
from torchrunx_ray.driver.cluster.connection import ClusterLeft
from torchrunx_ray.driver.cluster.inventory import is_here
from torchrunx_ray.wire.clock import now_ns

_READINGS = 5

_GOOD_FOR_S = 60.0
"""Time until the clocks are compared again. They drift apart by some 10 microseconds per second."""


async def compare(agents: Sequence[PooledAgent]) -> None:
    """Ask the agents on other machines for their clocks, unless the last comparison is recent.

    Ignores an agent that just died; its death is reported elsewhere.
    """
    stale = time.monotonic() - _GOOD_FOR_S
    asked = [a for a in agents if a.compared_at < stale and not is_here(a.node_id)]
    await asyncio.gather(*map(_compare, asked))


async def _compare(agent: PooledAgent) -> None:
    shortest_ns: int | None = None
    try:
        for _ in range(_READINGS):
            asked_ns = now_ns()
            theirs_ns: int = await agent.connection.ask(agent.calls.clock)
            took_ns = now_ns() - asked_ns
            # The best guess is that the agent read its clock after half the round trip. The shortest
            # round trip gives the closest guess.
            if shortest_ns is None or took_ns < shortest_ns:
                shortest_ns = took_ns
                agent.ahead_ns = theirs_ns - asked_ns - took_ns // 2
        agent.compared_at = time.monotonic()
    except (RayError, ClusterLeft):
        pass
