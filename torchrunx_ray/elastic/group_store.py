"""The store of a group whose workers belong to several agents."""

import json
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.agent.server.api import WorkerSpec

from torchrunx_ray.driver.cluster.connection import untyped_ray

_KEY = "torchrunx_ray/store"

_WAIT = timedelta(minutes=10)


class GroupStore:
    """A store that the agent of group rank 0 serves, a new one for each attempt: no worker reads keys of an earlier one.

    It lives as long as the agent, so that the workers of other agents may end later.
    """

    def __init__(self) -> None:
        self._served: TCPStore | None = None
        self.address: tuple[str, int] | None = None
        """Address of the store for the current attempt."""

    def agree(self, group: Any, spec: WorkerSpec, restarts: int) -> tuple[str, int]:
        """Serve the store, or learn from the rendezvous who does. Return its address."""
        key = _KEY
        if (
            spec.rdzv_handler.get_backend() == "static"
        ):  # the keys of earlier attempts stay in its store
            key = f"{_KEY}/{restarts}"
        if group.group_rank == 0:
            ip: str = spec.local_addr or untyped_ray.util.get_node_ip_address()
            self._served = TCPStore(ip, 0, is_master=True, wait_for_workers=False, timeout=_WAIT)
            group.store.set(key, json.dumps([ip, self._served.port]))
        addr, port = json.loads(group.store.get(key))
        self.address = str(addr), int(port)
        return self.address

    def close(self) -> None:
        """Serve no longer."""
        self._served = None
