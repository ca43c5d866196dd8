"""Hosts of an attempt, with their agents and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torchrunx_ray.driver.agents.pool import PooledAgent
from torchrunx_ray.driver.output.speaker import Sink, Speaker
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.ranks import Part, Place, lay_out


@dataclass(frozen=True)
class GroupPlan:
    """A group of workers as torch's elastic agent lays it out, for an attempt that has all of it or a part."""

    part: Part
    store: tuple[str, int] | None
    """Address of a store that another process serves; None if the attempt's first host serves it."""
    variables: Sequence[dict[str, str]]
    """Variables of the attempt's workers in the order of their ranks."""
    blocked_after_s: float = 0
    """Time that a worker may be blocked in the kernel; 0 if it may be as long as it likes."""


@dataclass(frozen=True)
class Crew:
    """Hosts of an attempt, with their agents, the agents' answers to `meet`, and their GPUs, by host index."""

    hosts: Sequence[Host]
    agents: Sequence[PooledAgent]
    met: Sequence[messages.Met]
    gpu_ids: Sequence[tuple[str, ...]]
    part: Part | None = None
    """Set if others have hosts in the group, too."""

    @property
    def hostnames(self) -> list[str]:
        """Names of the hosts."""
        return [host.label for host in self.hosts]

    @property
    def store(self) -> tuple[str, int]:
        """Address at which the first host holds a port for the store."""
        port = self.met[0].master_port
        assert port is not None
        return self.met[0].ip, port

    @cached_property
    def layout(self) -> list[list[Place]]:
        """Ranks of each host."""
        return lay_out([host.workers for host in self.hosts], self.part)

    @cached_property
    def places(self) -> list[Place]:
        """All ranks."""
        return [place for places in self.layout for place in places]

    def rank(self, host_index: int, local_rank: int) -> int:
        return self.layout[host_index][local_rank].rank

    def speaker(self, host_index: int, local_rank: int | None) -> Speaker:
        """Return a rank as a source of output; without a local rank, the host's template."""
        rank = None if local_rank is None else self.rank(host_index, local_rank)
        return Speaker(self.hosts[host_index].label, local_rank, rank, host_index == 0)

    @property
    def speakers(self) -> list[Speaker]:
        """All sources of output."""
        templates = [self.speaker(host_index, None) for host_index in range(len(self.hosts))]
        return templates + [self.speaker(p.host_index, p.local_rank) for p in self.places]


class RunSetup(Protocol):
    """The additions of a command to its run."""

    @property
    def sink(self) -> Sink:
        """A sink that takes all output, in the place of what the options name."""
        ...

    def plan(self, crew: Crew, attempt: int, restarts: int) -> GroupPlan:
        """Return the variables of an attempt's workers, before the attempt begins."""
        ...
