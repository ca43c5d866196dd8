"""The current Slurm allocation, for `hostnames="slurm"` and `workers_per_host="slurm"`."""

import os
import re
import subprocess


def hosts() -> list[str]:
    """The allocation's nodes, in Slurm's order."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise RuntimeError(
            'hostnames="slurm" outside of a Slurm allocation: SLURM_JOB_NODELIST is not set. Run the '
            "driver in a job (sbatch, salloc), or name the hosts."
        )
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise RuntimeError('hostnames="slurm": there is no scontrol on the PATH.') from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
    return done.stdout.split()


def workers_per_host(number_of_hosts: int) -> list[int]:
    """The allocation's GPUs on each node; its CPUs where it has no GPUs."""
    gpus = _gpus_per_node()
    if gpus:
        return [gpus] * number_of_hosts
    cpus = os.environ.get("SLURM_JOB_CPUS_PER_NODE") or os.environ.get("SLURM_CPUS_ON_NODE")
    if not cpus:
        raise RuntimeError(
            'workers_per_host="slurm" outside of a Slurm allocation: neither its GPUs '
            "(SLURM_GPUS_ON_NODE) nor its CPUs (SLURM_JOB_CPUS_PER_NODE) are set."
        )
    counts = _expand(cpus)
    return counts * number_of_hosts if len(counts) == 1 else counts


def _gpus_per_node() -> int:
    if on_node := os.environ.get("SLURM_GPUS_ON_NODE"):
        return int(on_node)
    if per_node := os.environ.get("SLURM_GPUS_PER_NODE"):  # "4", "a100:4", "a100:2,v100:2"
        return sum(int(part.rpartition(":")[2]) for part in per_node.split(","))
    ids = os.environ.get("SLURM_JOB_GPUS", "")
    return len([i for i in ids.split(",") if i])


def _expand(counts: str) -> list[int]:
    """Slurm's "72(x2),36" is 72, 72 and 36."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise RuntimeError(f"Slurm's {counts!r} is no list of counts such as 72(x2),36")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded
