"""Evidence for an agent that Ray's memory monitor killed to protect its node."""

from collections.abc import Mapping

from torchrunx_ray.wire import foreign_errors


def evidence(report: str, ranks: Mapping[int, int]) -> str:
    """Return the monitor's report with the memory of the host's workers.

    The monitor kills one of Ray's own processes, but most often a worker used the memory. `ranks` maps the pids
    of the host's workers to their ranks.
    """
    memory = foreign_errors.largest_processes(report)
    of_workers = [
        f"rank {rank} (pid {pid}) {memory[pid]:.1f} GB"
        for pid, rank in ranks.items()
        if pid in memory
    ]
    workers = (
        ", ".join(of_workers) or "unknown, because none of them is among the largest processes"
    )
    said = "\n".join(report.strip().splitlines()[:2])
    return (
        "the node ran short of memory, and Ray kills its own processes first. Memory of the workers: "
        f"{workers}.\nUse less memory (fewer workers on a host, smaller batches), or give the node more. The "
        "monitor's threshold is RAY_memory_usage_threshold, in the environment in which Ray is started."
        f"\nRay says: {said}"
    )
