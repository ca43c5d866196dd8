"""Time of `torchrunx-ray` and of torchrun, from the shell's view, in turn.

The script makes a gloo group and adds a number. "imports" is a process that imports torch and ray and joins the
cluster, without its exit: what a driver of any kind would need.

    python benchmarks/command.py [--samples 7]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import ray
from table import print_table

SCRIPT = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.tensor(1))
dist.barrier()
dist.destroy_process_group()
"""

IMPORTS = """
import os
import torch, ray
ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR")
os._exit(0)
"""

LARGEST = {
    ("torchrunx-ray", 4): ("torchrun", 0.5),
    ("torchrunx-ray", 8): ("torchrun", 0.4),
    ("standalone", 4): ("torchrun", 1.2),
    ("standalone", 8): ("torchrun", 1.0),
}
"""Largest part of the time of another command."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=7)
    samples = parser.parse_args().samples
    context = ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "add.py")
        script.write_text(SCRIPT)
        for _ in range(samples):
            for workers in (4, 8):
                for name, command in commands(workers, script).items():
                    times[name, workers].append(took(command, context.address_info["address"]))
    print_table(
        "command, in seconds",
        {f"{name}, {workers} workers": each for (name, workers), each in times.items()},
    )
    return int(not all_hold(times))


def commands(workers: int, script: Path) -> dict[str, list[str]]:
    """Return the commands to compare."""
    ours = [sys.executable, "-m", "torchrunx_ray", f"--nproc-per-node={workers}"]
    torchruns = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={workers}"]
    return {
        "imports": [sys.executable, "-c", IMPORTS],
        "torchrunx-ray": [*ours, str(script)],
        "torchrun": [*torchruns, "--standalone", str(script)],
        "standalone": [*ours, "--standalone", str(script)],
    }


def took(command: list[str], address: str) -> float:
    environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - begun


def all_hold(times: dict[tuple[str, int], list[float]]) -> bool:
    """Say which figures hold, and return True if all do."""
    holds = True
    wanted = {
        **{(*key,): (other, most) for key, (other, most) in LARGEST.items()},
        ("torchrunx-ray", 0): ("imports", 1.25),
    }
    for (name, workers), (other, most) in wanted.items():
        of = workers or 4
        part = statistics.median(times[name, of]) / statistics.median(times[other, of])
        print(f"{name}, {of} workers: {part:.2f} of {other}, at most {most} wanted")
        holds &= part <= most
    return holds


if __name__ == "__main__":
    sys.exit(main())
