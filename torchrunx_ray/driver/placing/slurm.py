"""The current Slurm allocation, for `hostnames="slurm"` and `workers_per_host="slurm"`."""

import os
import re
import subprocess
from collections.abc import Sequence


def hosts() -> list[str]:
    """Return the allocation's nodes in Slurm's order."""
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
    except OSError as error:
        raise RuntimeError(
            f'hostnames="slurm": scontrol cannot be run: {error.strerror}. Fix the scontrol on the PATH, or '
            "name the hosts."
        ) from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
    names = list(dict.fromkeys(done.stdout.split()))
    if not names:
        raise RuntimeError(
            f"`{' '.join(command)}` shows no node of the allocation. Does SLURM_JOB_NODELIST belong to a job? "
            "Otherwise name the hosts."
        )
    return names


def how_to_start_ray(nodes: Sequence[str]) -> str:
    """Return advice for an allocation where Ray does not run on all nodes."""
    count = len(nodes)
    return (
        "Start Ray on all nodes of the allocation, and your script on the first node:\n"
        f"  srun --nodes={count} --ntasks={count} --ntasks-per-node=1 ray symmetric-run "
        f"--address {nodes[0]}:6379 --min-nodes {count} -- python train.py\n"
        "If Ray runs there already, let the driver join it: RAY_ADDRESS=<its first node>:<its port>."
    )


def workers_per_host(number_of_hosts: int) -> list[int]:
    """Return the allocation's number of GPUs on each node, or of CPUs if the allocation has no GPUs."""
    counts = _gpus() or _cpus()
    return counts * number_of_hosts if len(counts) == 1 else counts


def _gpus() -> list[int]:
    """Return one number for all nodes, or one per node; empty if there are no GPUs."""
    for variable in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if text := os.environ.get(variable):
            counts = _counts(variable, text)
            on_node = counts if "(x" in text else [sum(counts)]  # without (x: one count per type
            return on_node if any(on_node) else []
    ids = os.environ.get("SLURM_JOB_GPUS", "")
    count = sum(_ids_in(part) for part in ids.split(",") if part)
    return [count] if count else []


def _cpus() -> list[int]:
    for variable in ("SLURM_JOB_CPUS_PER_NODE", "SLURM_CPUS_ON_NODE"):
        if text := os.environ.get(variable):
            return _counts(variable, text)
    if gpus := os.environ.get("SLURM_GPUS_ON_NODE"):
        raise RuntimeError(
            'workers_per_host="slurm" counts the GPUs of the allocation, or its CPUs if it has no GPUs. This '
            f"allocation has no GPUs (SLURM_GPUS_ON_NODE={gpus!r}), and SLURM_JOB_CPUS_PER_NODE is not set. "
            "Give a number."
        )
    raise RuntimeError(
        'workers_per_host="slurm" outside of a Slurm allocation: neither SLURM_GPUS_ON_NODE '
        "nor SLURM_JOB_CPUS_PER_NODE is set."
    )


def _counts(variable: str, text: str) -> list[int]:
    """Return the counts in Slurm's notation: "72(x2),36" is 72, 72 and 36.

    A type may precede a count, as in "gpu:a100:4".
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:[^():]+:)*(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise RuntimeError(
                f'workers_per_host="slurm": {variable}={text!r} is not a count such as 4, a100:4 or '
                "72(x2),36. Give workers_per_host as a number, or one for each host."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _ids_in(part: str) -> int:
    """Return the number of GPUs in "3", "0-3" or a name."""
    match = re.fullmatch(r"(\d+)-(\d+)", part)
    return 1 if match is None else int(match[2]) - int(match[1]) + 1
