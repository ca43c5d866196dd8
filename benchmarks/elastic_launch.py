"""Time of torch's `elastic_launch` with torch's agent and with RayElasticAgent, in turn.

One host, 4 workers, which form a gloo group and add a number. Each sample is a fresh process, which launches three times:
"cold" is the first launch, "warm" the last. Ray runs already, as on a cluster, and the imports of the process do not
count. An agent of Ray may be left from an earlier sample, but no template: each process asks for another one.

    python benchmarks/elastic_launch.py [--samples 10]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections import defaultdict

import ray
import torch
import torch.distributed as dist
from table import print_table
from torch.distributed.launcher import api
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

WORKERS = 4
COLD, WARM = 0.5, 0.2
"""Largest part of the time of torch's agent."""


def add() -> int:
    dist.init_process_group("gloo")
    total = torch.tensor(1)
    dist.all_reduce(total)
    return int(total)


def sample(agent: str) -> None:
    """Print the times of one process's launches."""
    if agent == "ours":
        from torchrunx_ray.elastic import RayElasticAgent

        # Another environment, and so another template.
        os.environ["OF_THIS_SAMPLE"] = uuid.uuid4().hex
        ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
        api.LocalElasticAgent = RayElasticAgent
    backend = "ray" if agent == "ours" else "c10d"
    times: list[float] = []
    for _ in range(3):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=WORKERS,
            rdzv_backend=backend,
            rdzv_endpoint="localhost:0",
            monitor_interval=0.1,
            max_restarts=0,
        )
        begun = time.perf_counter()
        values = elastic_launch(config, add)()
        times.append(time.perf_counter() - begun)
        assert values == dict.fromkeys(range(WORKERS), WORKERS), values
    print(json.dumps(times))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        sample(arguments.of)
        return 0
    address = ray.init("local", include_dashboard=False, log_to_driver=False).address_info[
        "address"
    ]
    times: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.samples):
        for agent in ("torch", "ours"):
            done = subprocess.run(
                [sys.executable, __file__, "--of", agent],
                env={**os.environ, "RAY_ADDRESS": str(address)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            cold, _, warm = json.loads(done.stdout.splitlines()[-1])
            times[f"{agent}, cold"].append(cold)
            times[f"{agent}, warm"].append(warm)
    print_table("agent and launch, in seconds", times)
    ratios = {
        kind: statistics.median(times[f"ours, {kind}"]) / statistics.median(times[f"torch, {kind}"])
        for kind in ("cold", "warm")
    }
    print(f"ours / torch's: cold {ratios['cold']:.2f}, warm {ratios['warm']:.2f}")
    return int(ratios["cold"] > COLD or ratios["warm"] > WARM)


if __name__ == "__main__":
    sys.exit(main())
