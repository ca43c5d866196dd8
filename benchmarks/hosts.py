"""Cost of each further host and each further worker of a launch.

Several raylets on one machine stand for hosts. Their agents and templates share its cores, so the measured cost per
host is an upper bound of the driver's cost per host. The launches are warm, in a session, with backend=None and gloo:
first with more and more hosts of 1 worker each, then on 1 host with more and more workers.

    python benchmarks/hosts.py [--samples 5] [--hosts 1,2,4,8,16] [--workers 1,4,16,64]
"""

import argparse
import json
import os
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from table import print_table

import torchrunx_ray as trx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--hosts", default="1,2,4,8,16")
    parser.add_argument("--workers", default="1,4,16,64")
    parser.add_argument("--json", help="where to write the times, too")
    arguments = parser.parse_args()
    os.environ["TORCHRUNX_LOG_DIR"] = ""
    hosts = [int(count) for count in arguments.hosts.split(",")]
    workers = [int(count) for count in arguments.workers.split(",")]
    times: dict[str, list[float]] = {}
    cluster = Cluster()
    for _ in range(max(hosts)):
        cluster.add_node(num_cpus=1, include_dashboard=False)
    ray.init(cluster.address, log_to_driver=False)
    for backend in (None, "gloo"):
        for count in hosts:
            launcher = trx.Launcher(hostnames=count, workers_per_host=1, backend=backend)
            times |= of(launcher, f"{count} hosts x 1 worker, {backend}", arguments.samples)
        for count in workers:
            launcher = trx.Launcher(
                hostnames=1, workers_per_host=count, cpus_per_worker=1 / count, backend=backend
            )
            times |= of(launcher, f"1 host x {count} workers, {backend}", arguments.samples)
    ray.shutdown()
    cluster.shutdown()
    print_table("seconds", times)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(times, indent=1))


def of(launcher: trx.Launcher, name: str, samples: int) -> dict[str, list[float]]:
    begun = time.perf_counter()
    with launcher.session() as session:
        session.run(os.getpid)
        first = time.perf_counter() - begun
        warm: list[float] = []
        for _ in range(samples):
            begun = time.perf_counter()
            session.run(os.getpid)
            warm.append(time.perf_counter() - begun)
    return {f"{name}: first": [first], f"{name}: warm": warm}


if __name__ == "__main__":
    main()
