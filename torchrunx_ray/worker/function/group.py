"""The worker's process group, and the rendezvous of process groups that the function creates."""

import contextlib
import importlib
import os
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from torchrunx_ray.wire.messages import ForkWorker
from torchrunx_ray.worker.dns import without_dns
from torchrunx_ray.worker.function.import_hook import after_import

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_RENDEZVOUS = "torch.distributed.rendezvous"
_LEAVE_TIMEOUT_S = 1.0

_USE_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Variable that makes torch take a store at any address for one that somebody serves already."""


def join(wanted: ForkWorker) -> Callable[[], None]:
    """Set the CUDA device, create the process group, and let the function create more groups.

    Return a function that the worker calls before it exits.
    """
    if wanted.cuda_device is not None:
        import torch

        if torch.cuda.is_available():  # a Ray node may declare GPUs that it does not have
            torch.cuda.set_device(wanted.cuda_device)
    shown = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = _LaunchStore(*wanted.worker.store, *shown)
    store.lend_to_later_groups()
    if wanted.worker.backend is None:
        return _destroy_groups
    from torch import distributed

    _check_backend(wanted.worker.backend, wanted.worker.hostname)
    timeout = timedelta(seconds=wanted.worker.timeout)
    place = wanted.place
    launch_store = store.with_prefix("launch", timeout)
    distributed.init_process_group(
        wanted.worker.backend,
        store=launch_store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    if launch_store.add("joined", 1) == place.world_size:
        launch_store.set("all joined", "")

    def leave() -> None:
        # If a rank ended now, it would break the group for ranks that are still connecting.
        launch_store.wait(["all joined"])
        _destroy_groups()

    return leave


def _destroy_groups() -> None:
    """Destroy the process groups, if there are any, with a timeout because a peer may be gone.

    If all groups are gloo's, leave them: destroying a group takes 10 ms for each peer (the wake-up interval of
    gloo's event loop), and the exit of the process closes the sockets as well.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    if {backend for backend, _ in distributed.distributed_c10d._world.pg_map.values()} == {"gloo"}:
        return
    destroying = threading.Thread(target=_destroy, args=(distributed,), daemon=True)
    destroying.start()
    destroying.join(_LEAVE_TIMEOUT_S)


def _destroy(distributed: types.ModuleType) -> None:
    # An exception means that a peer left first. The agent already has the value, and the process ends next.
    with contextlib.suppress(Exception):
        distributed.destroy_process_group()


def _check_backend(backend: str, hostname: str) -> None:
    import torch
    from torch import distributed

    names = [part.rpartition(":")[2] for part in backend.split(",")]
    if "fake" in names:
        importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers it
    for name in names:
        if not distributed.is_backend_available(name):
            there = [
                n for n in ("nccl", "gloo", "mpi", "ucc") if distributed.is_backend_available(n)
            ]
            raise ValueError(
                f"backend={backend!r}: torch {torch.__version__} on {hostname} was built without "
                f"{name}; it has {', '.join(there)}."
            )


@dataclass(frozen=True)
class _LaunchStore:
    """The launch's TCPStore, by its address as seen from this worker."""

    addr: str
    port: int
    master_addr: str
    """MASTER_ADDR of the worker, which the user of torch's agent may choose. No store need be there."""
    master_port: int

    def with_prefix(self, prefix: str, timeout: timedelta) -> "Store":
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        with without_dns():
            client = TCPStore(
                self.addr,
                self.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timeout,
            )
        return PrefixStore(f"torchrunx_ray/{prefix}", client)

    def lend_to_later_groups(self) -> None:
        """Let `init_process_group()` in the function use this store, any number of times.

        Without this patch, torch would make rank 0 listen at MASTER_PORT, where our store already listens. With
        TORCHELASTIC_USE_AGENT_STORE, torch would use the same keys each time, and a second group would read the
        first group's keys. Each group created at our address, or at the address that MASTER_ADDR and MASTER_PORT show,
        gets its own prefix. At any other address, rank 0 serves a store.
        """
        after_import(_RENDEZVOUS, self.patch)

    def patch(self, module: types.ModuleType) -> None:
        plain: Callable[..., Store] = module._create_c10d_store
        made: Counter[int] = Counter()

        def create_store(
            hostname: str,
            port: int,
            rank: int,
            world_size: int,
            timeout: timedelta,
            use_libuv: bool = True,
        ) -> "Store":
            if not self._is_at(hostname, port):
                with _without(_USE_AGENT_STORE):
                    return plain(hostname, port, rank, world_size, timeout, use_libuv)
            made[world_size] += 1
            return self.with_prefix(f"group{made[world_size]}/{world_size}", timeout)

        vars(module)["_create_c10d_store"] = create_store

    def _is_at(self, hostname: str, port: int) -> bool:
        hosts = (self.addr, self.master_addr, "localhost", "127.0.0.1")
        return hostname in hosts and port in (self.port, self.master_port)


@contextlib.contextmanager
def _without(variable: str) -> Generator[None]:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value
