"""Time from a SIGKILL until the workers run again, compared with other launchers.

One host, 4 workers, gloo. Each worker takes a step of DDP, then goes on with all_reduce, or sleeps ("peers asleep").
Then one process is killed. Times are in seconds, from the SIGKILL until the function's first line on all workers of the
next attempt ("first line"), and until the end of the first step there ("first step"). The first optimiser imports
torch._dynamo. Templates have imported it after an earlier run, or have learned of it from the attempt whose worker is
killed ("first run"). A killed template is compared with `python -c 'import torch, torch.distributed'` ("floor"), since
its replacement must import torch.

The rows with raylets are told of in `lost_hosts.py`; `--skip-hosts` leaves them out. The last rows are launches that nothing disturbs: the time from the call until the function's first line, with
max_restarts=3 and without, in turn.

    python benchmarks/restarts.py [--samples 10] [--peers torchrun,ray-train] [--peer-samples 10]

torchrun 2.13 does not come back after a SIGKILL, because the next attempt reads the keys of the killed one in the store
(pytorch#135712). It is measured as it is, and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which avoids this. A peer that
has not come back after `--patience` seconds is given up, and has that time.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lost_hosts
import ray
from functions import step_and_wait
from notes import pid_above, until_noted
from table import print_table

import torchrunx_ray as trx

WORKERS = 4
LEARNS_S = 2.5
"""Time for a template to notice and to import what its workers imported."""

FLOOR = "floor: import torch"
START_S, STEP_S, RATIO = 0.4, 0.8, 1.03
OF_TEMPLATE_S = 0.5
"""Time beyond the floor for a run whose template is killed."""


def after_kill(folder: str, victim: str, patience_s: float) -> dict[str, float]:
    """Kill once all workers have stepped. Return the time until the next attempt's first line and first step."""
    until_noted(folder, "stepped", [0], WORKERS, 120)
    time.sleep(LEARNS_S)
    worker = int(Path(folder, "begun 0 1").read_text().split()[1])
    killed_at = time.time()
    os.kill(pid_above(worker, victim), signal.SIGKILL)
    later: dict[str, float] = {}
    for kind, what in (("begun", "first line"), ("stepped", "first step")):
        try:
            later[what] = until_noted(folder, kind, [1, 2], WORKERS, patience_s) - killed_at
        except TimeoutError:
            return {**later, f"{what} (given up)": patience_s}
    return later


def ours(
    launcher: trx.Launcher, victim: str, patience_s: float, *, sleeps: bool = False
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run = launcher.submit(step_and_wait, folder, sleeps=sleeps)
        seen = after_kill(folder, victim, patience_s)
        run.result()
        return seen


def undisturbed(launcher: trx.Launcher) -> float:
    """Return the time from the call until the function's first line on all workers."""
    begun = time.time()
    return max(launcher.run(time.time)) - begun


SCRIPT = """
import os, sys
import torch.distributed as dist
from functions import step_and_wait

{launch}
"""

TORCHRUN = """
dist.init_process_group("gloo")
step_and_wait({folder!r})
dist.destroy_process_group()
"""

RAY_TRAIN = """
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
ray.init("local", num_cpus={workers} + 1, include_dashboard=False, log_to_driver=False)
def with_rank():
    import ray.train
    os.environ["RANK"] = str(ray.train.get_context().get_world_rank())
    step_and_wait({folder!r})
TorchTrainer(
    with_rank,
    scaling_config=ScalingConfig(num_workers={workers}),
    torch_config=TorchConfig(backend="gloo"),
    run_config=RunConfig(failure_config=FailureConfig(max_failures=2), storage_path={folder!r}),
).fit()
"""

BY_TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    f"--nproc-per-node={WORKERS}",
    "--max-restarts=2",
)
PEERS: dict[str, tuple[str, str, Sequence[str], Mapping[str, str]]] = {
    "torchrun": ("torch", TORCHRUN, BY_TORCHRUN, {}),
    "torchrun, without a shared store": (
        "torch",
        TORCHRUN,
        BY_TORCHRUN,
        {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    ),
    "ray-train": ("pyarrow", RAY_TRAIN, (), {}),
}
"""For each peer: a module whose presence shows that it is installed, its script, how it is run, and its variables."""


def of_peer(name: str, patience_s: float) -> dict[str, float]:
    _, launch, options, variables = PEERS[name]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        script = Path(folder, "script.py")
        script.write_text(SCRIPT.format(launch=launch.format(folder=folder, workers=WORKERS)))
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        with subprocess.Popen(
            [sys.executable, *options, str(script)],
            env={**os.environ, **variables, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                return after_kill(folder, "worker", patience_s)
            finally:
                process.terminate()


def floor() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, torch.distributed"], check=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--peer-samples", type=int, default=10)
    parser.add_argument("--peers", default="torchrun,ray-train")
    parser.add_argument("--patience", type=float, default=30)
    parser.add_argument("--skip-hosts", action="store_true")
    parser.add_argument("--json", help="where to write the times, too")
    arguments = parser.parse_args()
    os.environ["TORCHRUNX_LOG_DIR"] = ""
    ray.init("local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    peers = [
        name
        for name, (module, *_) in PEERS.items()
        if name.partition(",")[0] in arguments.peers.split(",") and importlib.util.find_spec(module)
    ]
    times = measure(arguments.samples, peers, arguments.peer_samples, arguments.patience)
    ray.shutdown()
    if not arguments.skip_hosts:
        times |= lost_hosts.measure(arguments.samples)
    show(times)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(times, indent=1))


def measure(
    samples: int, peers: Sequence[str], peer_samples: int, patience_s: float
) -> dict[str, list[float]]:
    """Measure all questions in turn, after a launch of ours that starts the agent."""
    plain = trx.Launcher(workers_per_host=WORKERS)
    patient = trx.Launcher(workers_per_host=WORKERS, max_restarts=3)
    times: dict[str, list[float]] = {}

    def add(who: str, seen: Mapping[str, float]) -> None:
        for what, taken in seen.items():
            times.setdefault(f"{who}: {what}", []).append(taken)

    ours(patient, "worker", patience_s)
    for sample in range(max(samples, peer_samples)):
        if sample < samples:
            times.setdefault(FLOOR, []).append(floor())
            add("SIGKILL of the worker", ours(patient, "worker", patience_s))
            asleep = ours(patient, "worker", patience_s, sleeps=True)
            add("SIGKILL of the worker, peers asleep", asleep)
            new = dataclasses.replace(patient, extra_env_vars={"SAMPLE": str(sample)}, linger=0)
            add("SIGKILL of the worker, first run", ours(new, "worker", patience_s))
            add("SIGKILL of the template", ours(patient, "template", patience_s))
        for peer in peers:
            if sample < peer_samples:
                add(f"SIGKILL of the worker, {peer}", of_peer(peer, patience_s))
    compare_undisturbed(plain, patient, 4 * samples, add)
    return dict(sorted(times.items()))


def compare_undisturbed(
    plain: trx.Launcher,
    patient: trx.Launcher,
    pairs: int,
    add: Callable[[str, Mapping[str, float]], None],
) -> None:
    launchers = {"max_restarts=0": plain, "max_restarts=3": patient}
    for pair in range(pairs):
        in_turn = list(launchers.items())
        for name, launcher in in_turn if pair % 2 else reversed(in_turn):
            add(f"undisturbed, {name}", {"first line": undisturbed(launcher)})


def show(times: Mapping[str, Sequence[float]]) -> None:
    floor_s = statistics.median(times[FLOOR])
    targets = {
        "SIGKILL of the worker: first line": START_S,
        "SIGKILL of the worker: first step": STEP_S,
        "SIGKILL of the worker, peers asleep: first line": START_S,
        "SIGKILL of the worker, peers asleep: first step": STEP_S,
        "SIGKILL of the worker, first run: first line": START_S,
        "SIGKILL of the worker, first run: first step": STEP_S,
        "SIGKILL of the template: first line": floor_s + OF_TEMPLATE_S,
        **lost_hosts.TARGETS,
    }

    def last(name: str, _median: float) -> str:
        target = f"{targets[name]:8.2f}" if name in targets else ""
        return f"{p90(times[name]):7.3f} {target}"

    print_table("seconds", times, last_head="   p90   target", last=last)
    with_, without = (times[f"undisturbed, max_restarts={n}: first line"] for n in (3, 0))
    ratio = statistics.median(with_) / statistics.median(without)
    print(f"undisturbed: {ratio:.3f} times the start without max_restarts (target {RATIO})")


def p90(seen: Sequence[float]) -> float:
    return seen[0] if len(seen) == 1 else statistics.quantiles(seen, n=10, method="inclusive")[-1]


if __name__ == "__main__":
    main()
