"""Time from a failure until the driver knows, compared with other launchers.

One host, 2 workers, gloo. Rank 1 fails, while rank 0 waits in an all_reduce ("collective") or sleeps ("asleep").
Times are in seconds, from the failure to the exception on the driver. Ctrl-C is timed until the KeyboardInterrupt.

    python benchmarks/failures.py [--samples 10] [--peers torchrun,torchrunx,ray-train]

Installed peers are measured in the same run, in turn with the rest. The timeout of torchrunx's process group is
`--patience` seconds, since torchrunx reports a failure only after that timeout.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from table import print_table

import torchrunx_ray as trx


def fail(how: str, peer: str, folder: str, patience_s: float) -> None:
    """Fail on rank 1 and wait on the other rank. Every rank of every launcher runs this function."""
    rank = int(os.environ["RANK"])
    if rank == 1:
        time.sleep(0.3)
        Path(folder, "at").write_text(str(time.time()))
        if how == "raise":
            raise ValueError("the first failure")
        os.kill(os.getpid(), signal.SIGKILL)
    if peer == "collective":
        dist.all_reduce(torch.ones(1))
    time.sleep(patience_s)


def ours(session: trx.Session, how: str, peer: str, patience_s: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        try:
            session.run(fail, how, peer, folder, patience_s)
        except (ValueError, trx.WorkerFailedError):
            return time.time() - float(Path(folder, "at").read_text())
    raise AssertionError("it did not fail")


def killed(launcher: trx.Launcher, victim: str, kill_raylet: Callable[[], None]) -> float:
    """Time from the SIGKILL of the template, agent or raylet until the driver raises."""
    with tempfile.TemporaryDirectory() as folder:
        run = launcher.submit(announce, folder)
        note = Path(folder, "above")
        while not note.exists():
            time.sleep(0.005)
        time.sleep(0.3)
        begun = time.time()
        if victim == "raylet":
            kill_raylet()
        else:
            os.kill(
                int(note.read_text().split()[("template", "agent").index(victim)]), signal.SIGKILL
            )
        try:
            run.result()
        except trx.AgentFailedError:
            return time.time() - begun
    raise AssertionError("it did not fail")


def announce(folder: str) -> None:
    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    if os.environ["RANK"] == "0":
        template = os.getppid()
        Path(folder, "unfinished").write_text(f"{template} {parent(parent(parent(template)))}")
        Path(folder, "unfinished").rename(Path(folder, "above"))
    time.sleep(1000)


def interrupted(session: trx.Session) -> float:
    with tempfile.TemporaryDirectory() as folder:

        def press() -> None:
            while not Path(folder, "above").exists():
                time.sleep(0.005)
            time.sleep(0.3)
            pressed.append(time.time())
            os.kill(os.getpid(), signal.SIGINT)

        pressed: list[float] = []
        threading.Thread(target=press).start()
        try:
            session.run(announce, folder)
        except KeyboardInterrupt:
            return time.time() - pressed[0]
    raise AssertionError("it was not interrupted")


PEER_SCRIPT = """
import datetime, os, sys, time
import torch.distributed as dist
from failures import fail

{launch}
"""

LAUNCHES = {
    "torchrun": """
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds={patience_s}))
fail({how!r}, {peer!r}, {folder!r}, {patience_s})
""",
    "torchrunx": """
import torchrunx
launcher = torchrunx.Launcher(
    hostnames=["localhost"], workers_per_host=2, backend="gloo", worker_timeout=int({patience_s})
)
if __name__ == "__main__":
    launcher.run(fail, {how!r}, {peer!r}, {folder!r}, {patience_s})
""",
    "ray-train": """
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
def train():
    import ray.train
    os.environ["RANK"] = str(ray.train.get_context().get_world_rank())
    fail({how!r}, {peer!r}, {folder!r}, {patience_s})
TorchTrainer(
    train, scaling_config=ScalingConfig(num_workers=2), torch_config=TorchConfig(backend="gloo")
).fit()
""",
}


NEEDS = {"torchrun": "torch", "torchrunx": "torchrunx", "ray-train": "pyarrow"}
"""A module whose presence shows that the peer is installed."""


def peers(name: str, how: str, peer: str, patience_s: float) -> float:
    """Time from the failure to the end of the launcher's process, which reports it."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        values = {"how": how, "peer": peer, "folder": folder, "patience_s": patience_s}
        launch = LAUNCHES[name].format(**values)
        here = str(Path(__file__).parent)
        script.write_text(PEER_SCRIPT.format(launch=launch))
        by_torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *(by_torchrun if name == "torchrun" else []), str(script)]
        path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}  # torchrunx's workers import `fail`
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        ended = time.time()
        if not Path(folder, "at").exists():
            raise RuntimeError(f"{name} did not come to the failure:\n{done.stderr[-2000:]}")
        return ended - float(Path(folder, "at").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--peer-samples", type=int, default=3)
    parser.add_argument("--patience", type=float, default=30)
    parser.add_argument("--json", help="where to write the times, too")
    parser.add_argument("--peers", default="torchrun,torchrunx,ray-train")
    arguments = parser.parse_args()
    patience_s: float = arguments.patience
    cases = [("raise", "collective"), ("raise", "asleep"), ("kill", "collective")]

    cluster = Cluster()
    cluster.add_node(num_cpus=2, include_dashboard=False)
    ray.init(cluster.address, log_to_driver=False)
    launcher = trx.Launcher(hostnames=1, workers_per_host=2)
    nodes: list[Any] = []

    def kill_raylet() -> None:
        (raylet,) = nodes[-1].all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)

    def of_raylet() -> float:
        nodes.append(cluster.add_node(num_cpus=2, resources={"doomed": 1}))
        doomed = trx.Launcher(hostnames=1, workers_per_host=2, resources_per_host={"doomed": 1})
        try:
            return killed(doomed, "raylet", kill_raylet)
        finally:
            cluster.remove_node(nodes[-1], allow_graceful=False)

    times: dict[str, list[float]] = {}
    with launcher.session() as session:
        session.run(os.getpid)
        for sample in range(arguments.samples):
            for how, peer in cases:
                name = f"{how}, peer {peer}"
                times.setdefault(name, []).append(ours(session, how, peer, patience_s))
                for other in filter(None, arguments.peers.split(",")):
                    is_here = importlib.util.find_spec(NEEDS[other])
                    if is_here and sample < arguments.peer_samples:
                        key = f"{name}: {other}"
                        times.setdefault(key, []).append(peers(other, how, peer, patience_s))
            times.setdefault("Ctrl-C", []).append(interrupted(session))
    for _ in range(arguments.samples):
        for victim in ("template", "agent"):
            name = f"SIGKILL of the {victim}"
            times.setdefault(name, []).append(killed(launcher, victim, kill_raylet))
        times.setdefault("SIGKILL of the raylet", []).append(of_raylet())
    print_table("seconds", dict(sorted(times.items())), digits=2)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(times, indent=1))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
