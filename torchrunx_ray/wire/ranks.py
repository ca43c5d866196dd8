"""Ranks of a launch, and the environment variables that give a worker its rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One worker's place in the launch."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    host_index: int
    """Index among the hosts of the launch."""
    hosts: int
    """Hosts of the whole group."""

    def variables(
        self, master_addr: str, master_port: int, run_id: str, restarts: int, max_restarts: int
    ) -> dict[str, str]:
        """Return the variables that torchrunx sets, and further ones that scripts written for torchrun read."""
        values = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": master_port,
            "GROUP_RANK": self.host_index,
            "GROUP_WORLD_SIZE": self.hosts,
            "ROLE_RANK": self.rank,
            "ROLE_WORLD_SIZE": self.world_size,
            "ROLE_NAME": "default",
            "NODE_RANK": self.host_index,
            "TORCHELASTIC_RESTART_COUNT": restarts,
            "TORCHELASTIC_MAX_RESTARTS": max_restarts,
            "TORCHELASTIC_RUN_ID": run_id,
        }
        return {name: str(value) for name, value in values.items()}


RANK_VARIABLES = frozenset(Place(0, 0, 1, 1, 0, 1).variables("", 0, "", 0, 0))
"""Variables that the launch sets for every worker; nobody else may set them."""


@dataclass(frozen=True)
class Part:
    """The part of a group that one launch has, if others have workers in the group, too."""

    first_rank: int
    world_size: int
    """Workers of the whole group."""
    hosts: int
    """Hosts of the whole group."""


def lay_out(workers_per_host: Sequence[int], part: Part | None = None) -> list[list[Place]]:
    """Return each host's places. Ranks are contiguous on a host, in the order of the hosts."""
    part = part or Part(0, sum(workers_per_host), len(workers_per_host))
    layout: list[list[Place]] = []
    first = part.first_rank
    for host, workers in enumerate(workers_per_host):
        layout.append(
            [
                Place(first + i, i, part.world_size, workers, host, part.hosts)
                for i in range(workers)
            ]
        )
        first += workers
    return layout


def first_gpu(gpus_per_worker: float, local_rank: int) -> int:
    """Return the index of the worker's first GPU among a host's GPUs. A fraction of a GPU never spans two GPUs."""
    if gpus_per_worker >= 1:
        return local_rank * int(gpus_per_worker)
    return local_rank // math.floor(1 / gpus_per_worker + 1e-9)


def visible_gpus(
    gpu_ids: Sequence[str], gpus_per_worker: float, local_rank: int
) -> tuple[str, int | None]:
    """Return CUDA_VISIBLE_DEVICES, and the index of the worker's first device in it.

    A worker sees all GPUs that the launch holds on its host, as under torchrun. With MIG, a worker sees only
    its own instance, since CUDA shows only one instance to a process. Without GPUs, a worker sees none.
    """
    if not gpu_ids:
        return "", None
    first = first_gpu(gpus_per_worker, local_rank)
    if any(gpu_id.startswith("MIG-") for gpu_id in gpu_ids):
        return gpu_ids[first], 0
    return ",".join(gpu_ids), first


def gpus_held(gpus_per_worker: float, workers: int) -> float:
    """Return the number of GPUs that a host's workers need together: whole GPUs, or a fraction of one."""
    if gpus_per_worker * workers <= 1:
        return gpus_per_worker * workers
    return first_gpu(gpus_per_worker, workers - 1) + max(1, int(gpus_per_worker))
