"""A Slurm allocation of the two hosts, with stand-ins for srun and scontrol."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.clusters.two_hosts import IPS, inside, network, under_names
from tests.processes import mentioning, wait_until

NAMES = {"trxh1": ("node1.cluster", "node1"), "trxh2": ("node2.cluster", "node2")}
"""Each host's hostname, and Slurm's name for it."""

# A bare ray.init() finds its cluster by what lies in /tmp/ray.
_OWN_TMP_RAY = 'mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && exec "$@"'


def stand_in_scontrol(folder: Path, nodes: Sequence[str]) -> Path:
    """A folder for the PATH, with a scontrol that shows these nodes."""
    return _command(
        folder,
        "scontrol",
        '[ "$1 $2 $3" = "show hostnames $SLURM_JOB_NODELIST" ] && '
        f"printf '%s\\n' {' '.join(nodes)}",
    )


def scontrol_of_plain_lists(folder: Path) -> Path:
    """A folder for the PATH, with a scontrol that takes apart a list of whole names, as Slurm's does."""
    return _command(
        folder, "scontrol", """[ "$1 $2" = "show hostnames" ] && echo "$3" | tr , '\\n'"""
    )


def _command(folder: Path, name: str, script: str) -> Path:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path.parent


@contextlib.contextmanager
def allocated(folder: Path) -> Iterator[dict[str, str]]:
    """An allocation with nothing on its nodes; the environment of its batch script."""
    mark = {"TORCHRUNX_RAY_TESTS": uuid.uuid4().hex}
    slurm_names = [names[1] for names in NAMES.values()]
    prefixes = [[*inside(host), *under_names(host, NAMES, folder)] for host in IPS]
    stand_in_scontrol(folder, slurm_names)
    srun = Path(__file__).with_name("srun.py")
    commands = _command(folder, "srun", f'exec {sys.executable} {srun} "$@"')
    without_ray = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    with network():
        try:
            yield {
                **without_ray,
                **mark,
                "PATH": f"{commands}:{os.environ['PATH']}",
                "HOSTS_OF_SRUN": json.dumps(dict(zip(slurm_names, prefixes, strict=True))),
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
                "SLURM_CPUS_ON_NODE": "2",
            }
        finally:
            _kill_all(f"TORCHRUNX_RAY_TESTS={mark['TORCHRUNX_RAY_TESTS']}")


def run_batch_script(script: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """On the allocation's first node, as sbatch would: its exit status and output.

    Steps in the background may go on until the allocation ends.
    """
    path, output = folder / "batch", folder / "slurm.out"
    path.write_text(script)
    own_tmp_ray = ["unshare", "--mount", "sh", "-c", _OWN_TMP_RAY, "sh"]
    on_first = [*inside("trxh1"), *under_names("trxh1", NAMES, folder)]
    with output.open("w") as file:
        done = subprocess.run(
            [*own_tmp_ray, *on_first, "bash", str(path)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=220,
            check=False,
        )
    return done.returncode, output.read_text()


def _kill_all(mark: str) -> None:
    for pid in mentioning(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not mentioning(mark), 30)
