"""Time of a launch, in units of the import of torch.

The function is a no-op with one all_reduce, on one host. Each sample is a fresh driver process with its own Ray
cluster, and its clock starts after `ray.init()`. Before each sample, the floors are measured: the whole process
`python -c 'import torch, torch.distributed'`, and a fork of such a process until its end.

    python benchmarks/launch.py [--samples 5] [--workers 4]
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from table import print_table

BASELINE = [sys.executable, "-c", "import torch, torch.distributed"]
FORKS = """
import gc, os, statistics, time, torch, torch.distributed
gc.freeze()
def fork():
    begun = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return time.perf_counter() - begun
print(statistics.median(fork() for _ in range(20)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", help="where to write the times, too")
    parser.add_argument("--one-sample", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_sample:
        print(json.dumps(one_sample(arguments.workers)))
        return
    subprocess.run(BASELINE, check=True)  # warms the page cache
    baselines: list[float] = []
    forks: list[float] = []
    samples: list[dict[str, list[float]]] = []
    for _ in range(arguments.samples):
        baselines.append(seconds(lambda: subprocess.run(BASELINE, check=True)))
        forks.append(float(subprocess.check_output([sys.executable, "-c", FORKS])))
        samples.append(sample_in_fresh_process(arguments.workers))
    times = {
        "baseline: python, import torch": baselines,
        "floor: fork of such a process": forks,
        **{q: [s for sample in samples for s in sample[q]] for q in samples[0]},
    }
    baseline = statistics.median(baselines)
    print_table(
        "seconds",
        times,
        last_head="of the baseline",
        last=lambda name, median: "" if "MB" in name else f"{median / baseline:.2f}x",
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(times, indent=1))


def sample_in_fresh_process(workers: int) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--one-sample", "--workers", str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def one_sample(workers: int) -> dict[str, list[float]]:
    """Return each question's times in one driver process."""
    import torchrunx_ray as trx

    launcher = trx.Launcher(workers_per_host=workers, linger=20)
    with local_ray(num_cpus=2 * workers):
        times = {
            "first launch": [seconds(lambda: launcher.run(no_op))],
            "second plain launch": [seconds(lambda: launcher.run(no_op))],
            "18 more": [seconds(lambda: launcher.run(no_op)) for _ in range(18)],
        }
        with launcher.session() as session:
            session.run(no_op)
            times["in a session"] = [seconds(lambda: session.run(no_op)) for _ in range(5)]
            memory = session.run(proportional_memory_mb)
            times["memory per worker (MB)"] = list(memory)
            for count in (2, 8):
                other = trx.Launcher(workers_per_host=count, cpus_per_worker=0.1)
                with other.session() as others:
                    others.run(no_op)
                    name = f"in a session, {count} workers"
                    times[name] = [seconds(lambda: others.run(no_op)) for _ in range(5)]
    one_shot = trx.Launcher(workers_per_host=workers, linger=0)
    with local_ray(num_cpus=2 * workers):
        times["linger=0"] = [seconds(lambda: one_shot.run(no_op)) for _ in range(3)]
    with local_ray(num_cpus=workers):
        launcher.run(no_op)
        times["plain, taking all CPUs"] = [seconds(lambda: launcher.run(no_op)) for _ in range(5)]
    return times


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    wait_for_prestarted_workers()
    yield
    ray.shutdown()


def wait_for_prestarted_workers() -> None:
    """Wait until Ray is idle, since it starts processes in advance right after its start."""
    deadline = time.monotonic() + 5
    quiet_since = time.monotonic()
    used = time.process_time()
    while time.monotonic() < deadline and time.monotonic() - quiet_since < 1:
        time.sleep(0.1)
        load = machine_busy_s()
        if load - used > 0.03:
            quiet_since = time.monotonic()
        used = load


def machine_busy_s() -> float:
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system = (int(field) for field in fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def no_op() -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))


def proportional_memory_mb() -> float:
    """Return the worker's proportional share of its mapped memory, after it joined a group."""
    no_op()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (pss,) = (int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return pss * 1024 / 1e6


def seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
