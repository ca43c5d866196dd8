"""How far the clocks of the hosts are apart, for putting what happens on them in order."""

import asyncio
from collections.abc import Sequence

from ray.exceptions import RayError

from torchrunx_ray.driver.cluster import ClusterLeft
from torchrunx_ray.driver.pool import Agent
from torchrunx_ray.wire.clock import now_ns

_READINGS = 5


class Clocks:
    """Those of the agents' hosts against the driver's. Unknown until `compare` has heard of them."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self._agents = agents
        self._ahead_ns = [0] * len(agents)

    async def compare(self) -> None:
        """Ask every agent; one that just died is heard of otherwise."""
        if len(self._agents) > 1:
            await asyncio.gather(*map(self._compare, range(len(self._agents))))

    def on_ours(self, host_index: int, time_ns: int) -> int:
        """A time that was read on a host, on the driver's clock."""
        return time_ns - self._ahead_ns[host_index]

    async def _compare(self, host_index: int) -> None:
        agent = self._agents[host_index]
        shortest_ns: int | None = None
        try:
            for _ in range(_READINGS):
                asked_ns = now_ns()
                theirs_ns: int = await agent.connection.ask(agent.calls.clock)
                took_ns = now_ns() - asked_ns
                # Half the round trip is the best guess of when the agent read its clock, and the
                # shortest one the closest.
                if shortest_ns is None or took_ns < shortest_ns:
                    shortest_ns = took_ns
                    self._ahead_ns[host_index] = theirs_ns - asked_ns - took_ns // 2
        except (RayError, ClusterLeft):
            pass
