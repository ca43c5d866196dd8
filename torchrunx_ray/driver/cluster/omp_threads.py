"""The source of the driver's OMP_NUM_THREADS: the user, or Ray, which sets it in tasks, actors and jobs."""

import math
import os

from torchrunx_ray.driver.cluster.connection import is_in_rays_worker, untyped_ray
from torchrunx_ray.wire import proc

_NAME = "OMP_NUM_THREADS"


def were_set_by_ray() -> bool:
    """Return True if Ray, and not the user, set OMP_NUM_THREADS.

    Ray sets the variable in a Ray worker that started without it, to the worker's number of CPUs, at least 1. A
    job's script inherits the variable from such a worker, the job's supervisor. The value does not apply to the
    workers of a launch, which have CPUs of their own.
    """
    value, pid = os.environ.get(_NAME), os.getpid()
    while value is not None and pid > 1:
        try:
            begun_with = _environment_at_start(pid)
            parent = int(proc.stat(pid)[1])
        except OSError:  # a process of another user
            return False
        if _NAME not in begun_with:
            if pid == os.getpid():
                return is_in_rays_worker() and value == _as_ray_sets_it_here()
            return "RAY_RAYLET_PID" in begun_with
        if begun_with[_NAME] != value:
            return False
        pid = parent
    return False


def _as_ray_sets_it_here() -> str:
    cpus: float = untyped_ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return str(max(math.floor(cpus), 1))


def _environment_at_start(pid: int) -> dict[str, str]:
    entries = (entry.decode(errors="surrogateescape") for entry in proc.environment(pid))
    pairs = (entry.partition("=") for entry in entries)
    return {name: value for name, _, value in pairs}
