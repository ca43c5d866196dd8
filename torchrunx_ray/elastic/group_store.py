"""The store of a group whose workers belong to several agents."""

import json
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.agent.server.api import WorkerSpec

from torchrunx_ray.driver.cluster.connection import untyped_ray
from torchrunx_ray.errors import LaunchError

_KEY = "torchrunx_ray/store"

_WAIT = timedelta(minutes=10)

_LOOK_S = 0.05


class GroupStore:
    """A store that the agent of group rank 0 serves, a new one for each attempt: no worker reads keys of an earlier one.

    It lives as long as the agent, so that the workers of other agents may end later.
    """

    def __init__(self) -> None:
        self._served: TCPStore | None = None
        self._round = 0
        """Number of the last store that was served, or learned of at a static rendezvous."""
        self.address: tuple[str, int] | None = None
        """Address of the store for the current attempt."""

    def agree(self, group: Any, spec: WorkerSpec) -> tuple[str, int]:
        """Serve the store, or learn from the rendezvous who does. Return its address.

        Raises LaunchError if the agent of group rank 0 serves none in time.
        """
        if group.group_rank == 0:
            ip: str = spec.local_addr or untyped_ray.util.get_node_ip_address()
            self._served = TCPStore(ip, 0, is_master=True, wait_for_workers=False, timeout=_WAIT)
            self._round += 1
            group.store.set(_KEY, json.dumps([self._round, ip, self._served.port]))
            self.address = ip, self._served.port
            return self.address
        # Each round of other rendezvous has a store of its own, without keys of earlier attempts.
        last = self._round if spec.rdzv_handler.get_backend() == "static" else 0
        deadline = time.monotonic() + _WAIT.total_seconds()
        while time.monotonic() < deadline:  # not in the store's own wait, which no signal ends
            if group.store.check([_KEY]):
                self._round, ip, port = json.loads(group.store.get(_KEY))
                if self._round > last:
                    self.address = str(ip), int(port)
                    return self.address
            time.sleep(_LOOK_S)
        raise LaunchError(
            f"the agent with group rank 0 has served no store for this attempt in {_WAIT}: it has not restarted its workers, "
            "or is gone. With a static rendezvous, agents do not tell each other of restarts; use c10d or ray."
        )

    def close(self) -> None:
        """Serve no longer."""
        self._served = None
