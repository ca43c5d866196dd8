"""What a launch could leave on this machine."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from grpc import RpcError
from ray._private.internal_api import node_stats

from tests import processes
from tests.memory import shared_memory

MARK = "TORCHRUNX_RAY_TRACES"
"""In the environment of all that is ours: somebody else may work on this machine meanwhile."""

_MUCH = 2**26
"""More bytes of shared memory than Ray's own processes take and give back between two looks."""


@dataclass
class Traces:
    """What is on the machine and in the cluster; Ray must be initialised."""

    processes: dict[str, str]
    groups: list[str]
    free_cpus: float
    in_dev_shm: list[str]
    shared_memory: int
    temporary: list[str]
    objects: int

    @classmethod
    def now(cls) -> "Traces":
        groups: dict[str, Any] = ray.util.placement_group_table()
        return cls(
            processes=dict(_marked_processes()),
            groups=[g["name"] for g in groups.values() if g["state"] != "REMOVED"],
            free_cpus=ray.available_resources().get("CPU", 0),
            in_dev_shm=[name for name in os.listdir("/dev/shm") if "plasma" not in name],
            shared_memory=shared_memory(of_ray=False),
            temporary=os.listdir(os.environ["TMPDIR"]),
            objects=objects_in_store(),
        )

    def missing_from(
        self, now: "Traces", free_cpus: float, *, raylet_was_renewed: bool = False
    ) -> list[str]:
        """What is there that was not; what is not free that should be."""
        new = now.processes.keys() - self.processes.keys()
        left = [f"process {who}: {now.processes[who]}" for who in new]
        if raylet_was_renewed:
            left = [line for line in left if not _is_of_ray(line)]
        left += [f"placement group {name}" for name in now.groups]
        left += [f"/dev/shm/{name}" for name in set(now.in_dev_shm) - set(self.in_dev_shm)]
        left += [_with_contents(name) for name in set(now.temporary) - set(self.temporary)]
        if now.free_cpus != free_cpus:
            left.append(f"{now.free_cpus} CPUs are free, not {free_cpus}")
        if now.shared_memory > self.shared_memory + _MUCH:
            left.append(f"{now.shared_memory - self.shared_memory} bytes of shared memory")
        if now.objects > self.objects:
            left.append(f"{now.objects} objects in Ray's store")
        return left


def _marked_processes() -> Iterator[tuple[str, str]]:
    """Their command lines, by pid and start time; of others those without an environment, too."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for pid in processes.pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words = processes.command_line(pid).strip()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        # Kernel threads have no words; Ray's workers that wait for work come and go.
        is_rays = "ray::IDLE" in words or "default_worker" in words
        is_ours = not environment or mark in environment
        if words and fields[0] != "Z" and not is_rays and is_ours:
            yield f"{pid} {fields[19]}", words


def _with_contents(name: str) -> str:
    path = Path(os.environ["TMPDIR"], name)
    try:
        age_s = time.time() - path.stat().st_ctime
        inside = [str(each.relative_to(path)) for each in path.rglob("*")]
    except OSError:
        return f"a temporary {name}"
    return f"a temporary {name}, {age_s:.0f} s old, with {inside}"


def _is_of_ray(line: str) -> bool:
    return any(words in line for words in ("/ray/", "-m ray.scripts", "ray::")) and (
        "ray::Agent" not in line
    )


def objects_in_store() -> int:
    """In the stores of the nodes that answer; small ones do not lie there."""
    count = 0
    for node in ray.nodes():
        address, port = node["NodeManagerAddress"], node["NodeManagerPort"]
        try:
            stats: Any = node_stats(address, port, include_memory_info=False)
        except RpcError:
            continue
        count += stats.store_stats.num_local_objects
    return count
