"""The rendezvous of RayElasticAgent, whose hosts Ray finds: backend "ray"."""

from collections.abc import Callable
from typing import Protocol

from torch._C._distributed_c10d import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)


class Places(Protocol):
    """The part of an agent that its rendezvous calls."""

    def place(self) -> tuple[str, int]:
        """Wait until each host of the next attempt has an agent. Return the address of the workers' store."""
        ...

    @property
    def hosts_waiting(self) -> int: ...


class RayRendezvous(RendezvousHandler):
    """Finds hosts in the Ray cluster: from `min_nodes` to `max_nodes` of the parameters.

    The agent has one worker group over all hosts. So the rendezvous has one member, the agent, and no store that others
    could reach.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        self.params = params
        self._places: Places | None = None
        self._is_closed = False

    def bind(self, places: Places) -> None:
        """Let an agent find the hosts."""
        self._places = places

    @property
    def hostnames(self) -> int | tuple[int, int]:
        """Number of hosts, or the smallest and the largest."""
        least, most = self.params.min_nodes, self.params.max_nodes
        return least if least == most else (least, most)

    @property
    def placement_timeout(self) -> float | None:
        """Time to wait for hosts: `join_timeout`, or else `timeout` of the parameters."""
        wanted = self.params.get("join_timeout", self.params.get("timeout"))
        return None if wanted is None else float(wanted)

    def get_backend(self) -> str:
        """Return "ray"."""
        return "ray"

    @property
    def use_agent_store(self) -> bool:
        """True: the store of the workers is served for them."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the hosts of the next attempt."""
        if self._is_closed:
            raise RendezvousClosedError
        if self._places is None:
            raise RuntimeError(
                'the rendezvous "ray" is for torchrunx_ray.elastic.RayElasticAgent, which finds the hosts. Under torch\'s '
                "own agent use --rdzv-backend c10d."
            )
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(*self._places.place()))

    def is_closed(self) -> bool:
        """Return True after `set_closed` or `shutdown`."""
        return self._is_closed

    def set_closed(self) -> None:
        """Let no further attempt begin."""
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        """Return the number of hosts with which another attempt can begin, which counts as no restart."""
        return 0 if self._places is None or self._is_closed else self._places.hosts_waiting

    def get_run_id(self) -> str:
        """Return the id of the parameters."""
        return self.params.run_id

    def shutdown(self) -> bool:
        """Close the rendezvous. The agent gives the hosts back."""
        self.set_closed()
        return True


def handler() -> Callable[[RendezvousParameters], RayRendezvous]:
    """Return the function that makes the handler, as the entry point `torchrun.handlers` wants it."""
    return RayRendezvous
