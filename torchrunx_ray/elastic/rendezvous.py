"""The rendezvous "ray": Ray finds the hosts for RayElasticAgent, and agents of torchrun meet at a store."""

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
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler


class Places(Protocol):
    """The part of an agent that its rendezvous calls."""

    def place(self) -> tuple[str, int]:
        """Wait until each host of the next attempt has an agent. Return the address of the workers' store."""
        ...

    @property
    def hosts_waiting(self) -> int: ...


class RayRendezvous(RendezvousHandler):
    """From `min_nodes` to `max_nodes` hosts. Who finds them depends on the agent.

    RayElasticAgent has one worker group over all hosts, which Ray finds. Any other agent, such as torchrun's, has the
    workers of its own host, and meets the others at the store at `endpoint`.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        self.params = params
        self._found: RendezvousHandler | None = None
        """The handler that does the work; None until an agent is bound, or first asks."""

    def bind(self, places: Places) -> None:
        """Let an agent find the hosts."""
        self._found = _OverRay(self.params.run_id, places)

    @property
    def hostnames(self) -> int | tuple[int, int]:
        """Number of hosts, or the smallest and the largest."""
        least, most = self.params.min_nodes, self.params.max_nodes
        return least if least == most else (least, most)

    def placement_timeout(self, *, is_elsewhere: bool) -> float | None:
        """Return the time to wait for hosts, if the parameters decide it.

        `join_timeout` always does. `timeout`, which torch sets by itself, only does if no time is set elsewhere.
        """
        wanted = self.params.get("join_timeout")
        if wanted is None and not is_elsewhere:
            wanted = self.params.get("timeout")
        return None if wanted is None else float(wanted)

    def get_backend(self) -> str:
        """Return "ray"."""
        return "ray"

    @property
    def use_agent_store(self) -> bool:
        """True if an agent serves the store of the workers."""
        return self._handler.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the hosts of the next attempt."""
        serve_anew(self._handler)
        return self._handler.next_rendezvous()

    def is_closed(self) -> bool:
        """Return True after `set_closed` or `shutdown`."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """Let no further attempt begin."""
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        """Return the number of hosts with which another attempt can begin, which counts as no restart."""
        return self._handler.num_nodes_waiting()

    def get_run_id(self) -> str:
        """Return the id of the parameters."""
        return self.params.run_id

    def shutdown(self) -> bool:
        """Close the rendezvous. RayElasticAgent gives the hosts back."""
        return self._found is None or self._found.shutdown()

    @property
    def _handler(self) -> RendezvousHandler:
        if self._found is None:
            self._found = _at_a_store(self.params)
        return self._found


class _OverRay(RendezvousHandler):
    """The rendezvous of a RayElasticAgent: its only member, with a store that nobody else could reach."""

    def __init__(self, run_id: str, places: Places) -> None:
        self._run_id = run_id
        self._places = places
        self._is_closed = False

    def get_backend(self) -> str:
        return "ray"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._is_closed:
            raise RendezvousClosedError
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(*self._places.place()))

    def is_closed(self) -> bool:
        return self._is_closed

    def set_closed(self) -> None:
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        return 0 if self._is_closed else self._places.hosts_waiting

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self.set_closed()
        return True


def _at_a_store(params: RendezvousParameters) -> RendezvousHandler:
    """Return torch's rendezvous "c10d". A single node needs no endpoint."""
    if not params.endpoint and params.max_nodes > 1:
        raise ValueError(
            'under torchrun, the nodes of the rendezvous "ray" meet at a store, and none is named: give every torchrun '
            "the same --rdzv-endpoint=HOST:PORT, with HOST one of the nodes. Without torchrun, let "
            "torchrunx_ray.elastic.RayElasticAgent find the hosts in the Ray cluster."
        )
    return get_rendezvous_handler(
        RendezvousParameters(
            "c10d",
            params.endpoint or "localhost:0",
            params.run_id,
            params.min_nodes,
            params.max_nodes,
            params.local_addr,
            **vars(params)["config"],  # whose type torch leaves open
        )
    )


def serve_anew(handler: RendezvousHandler) -> None:
    """Let the next round of torch's dynamic rendezvous serve the workers a new store.

    torch serves one store for all rounds. So after a restart, workers read addresses of dead peers; and an agent that
    joins waits for ever, since nobody tells it the address again.
    """
    if isinstance(handler, DynamicRendezvousHandler):
        vars(handler).update(_shared_tcp_store_server=None, _bootstrap_store_info=None)


def handler() -> Callable[[RendezvousParameters], RayRendezvous]:
    """Return the function that makes the handler, as the entry point `torchrun.handlers` wants it."""
    return RayRendezvous
