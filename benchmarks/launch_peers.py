"""Time of a launch, compared with other launchers of the same function.

One host, gloo. Each sample is a fresh driver process. "cold" is its first launch. "warm" is the median of three more
launches, or one more launch for a peer whose later launches take as long as the first. Ray Train starts over each time
and takes longest, so it makes only one launch. torchrun has no driver, so the whole command is timed. Ray runs before
the clock starts, as a cluster does for its users. The floor is the whole process
`python -c 'import torch, torch.distributed'`. All take turns in each round.

    python benchmarks/launch_peers.py [--samples 5] [--launches no_op:1,2,4,8,16 ddp_step:4]

Each measurement prints a dot. A peer that is not installed or that fails is left out, and its last line of output is
shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from table import print_table

HERE = Path(__file__).parent

BEGIN = """
import json, statistics, sys, time
from functions import {function} as function

def report(launch, warm=3):
    times = []
    for _ in range(1 + warm):
        begun = time.perf_counter()
        launch()
        times.append(time.perf_counter() - begun)
    later = {{"warm": statistics.median(times[1:])}} if warm else {{}}
    print("TIMES", json.dumps({{"cold": times[0], **later}}))
"""

RAY = """
import os, ray
ray.init("local", num_cpus={workers} + 1, include_dashboard=False, log_to_driver=False)
time.sleep(2)  # it starts processes ahead of need
"""

LAUNCHES = {
    "torchrunx_ray": RAY
    + """
import torchrunx_ray
launcher = torchrunx_ray.Launcher(workers_per_host={workers})
report(lambda: launcher.run(function))
""",
    "torchrunx_ray, session": RAY
    + """
import torchrunx_ray
with torchrunx_ray.Launcher(workers_per_host={workers}).session() as session:
    session.run(function)
    report(lambda: session.run(function))
""",
    "torchrunx": """
import torchrunx
if __name__ == "__main__":
    launcher = torchrunx.Launcher(
        hostnames=["localhost"], workers_per_host={workers}, backend="gloo"
    )
    report(lambda: launcher.run(function), warm=1)
""",
    "ray train": RAY
    + """
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

def launch():
    TorchTrainer(
        function,
        scaling_config=ScalingConfig(num_workers={workers}),
        torch_config=TorchConfig(backend="gloo"),
    ).fit()

report(launch, warm=0)
""",
    "monarch": """
from monarch.actor import Actor, current_rank, endpoint, this_host

class Worker(Actor):
    @endpoint
    def run(self, port: int) -> None:
        import os
        import torch.distributed as dist
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=current_rank().rank, world_size={workers})
        from functions import {function} as function
        function()
        dist.destroy_process_group()

def launch():
    import socket
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = this_host().spawn_procs({{"gpus": {workers}}})
    processes.spawn("worker", Worker).run.call(port).get()
    processes.stop().get()

if __name__ == "__main__":
    report(launch, warm=1)
""",
}

TORCHRUN = """
import torch.distributed as dist
from functions import {function}
dist.init_process_group("gloo")
{function}()
dist.destroy_process_group()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument(
        "--launches",
        nargs="+",
        default=["no_op:1,2,4,8,16", "ddp_step:4"],
        help="a function of functions.py, and on how many workers",
    )
    parser.add_argument("--json", help="where to write the times, too")
    arguments = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {}
    for launch in arguments.launches:
        function, _, counts = launch.partition(":")
        for workers in map(int, counts.split(",")):
            name = f"{function}, {workers} workers"
            times[name] = measure(function, workers, arguments.samples, uncounted=int(not times))
            report(name, times[name])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(times, indent=1))


def measure(function: str, workers: int, samples: int, uncounted: int) -> dict[str, list[float]]:
    """Measure all launchers in turn, after uncounted rounds that fill the page cache."""
    times: dict[str, list[float]] = {}
    left_out: set[str] = set()
    questions: dict[str, Callable[[], dict[str, float]]] = {
        "floor: import torch": floor,
        "torchrun": lambda: torchrun(function, workers),
        **{name: in_turn(name, function, workers) for name in LAUNCHES},
    }
    for sample in range(uncounted + samples):
        for name, question in questions.items():
            if name in left_out:
                continue
            print(".", end="", file=sys.stderr, flush=True)  # progress, since this takes long
            try:
                seen = question()
            except subprocess.CalledProcessError as error:
                left_out.add(name)
                print(f"{name} is left out: {last_words(error)}")
                continue
            for kind, taken in seen.items():
                if sample >= uncounted:
                    times.setdefault(f"{name}: {kind}", []).append(taken)
    return times


def in_turn(name: str, function: str, workers: int) -> Callable[[], dict[str, float]]:
    script = (BEGIN + LAUNCHES[name]).format(function=function, workers=workers)
    return lambda: json.loads(run(script).partition("TIMES ")[2].splitlines()[0])


def floor() -> dict[str, float]:
    return {"whole process": seconds([sys.executable, "-c", "import torch, torch.distributed"])}


def torchrun(function: str, workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(TORCHRUN.format(function=function))
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        return {"cold": seconds([sys.executable, *command, str(script)])}


def run(script: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.py")
        path.write_text(script)
        return started([sys.executable, str(path)])


def seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    started(command)
    return time.perf_counter() - begun


def started(command: list[str]) -> str:
    """Run a command and return its output."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHRUNX_LOG_DIR": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def last_words(error: subprocess.CalledProcessError) -> str:
    lines = (error.stderr or error.stdout or "").strip().splitlines()
    return lines[-1] if lines else f"exit code {error.returncode}"


def report(name: str, times: dict[str, list[float]]) -> None:
    base = statistics.median(times["floor: import torch: whole process"])
    print()
    print_table(
        name,
        times,
        digits=2,
        last_head="of the floor",
        last=lambda _, median: f"{median / base:.2f}x",
    )


if __name__ == "__main__":
    main()
