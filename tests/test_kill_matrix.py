"""Whoever is killed, and whenever: the launch ends soon, and nothing of it is left.

Prints what the driver raised for each victim and moment. Pairs of victims are killed at once.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from grpc import RpcError
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

import torchrunx_ray as trx
from tests import processes
from tests.clusters.raylets import raylets
from tests.conftest import SHOWN_AT_END

pytestmark = pytest.mark.slow

MARK = uuid.uuid4().hex

DRIVER = """
import os, subprocess, sys
from pathlib import Path
import kill_matrix_preload
import ray
import torchrunx_ray as trx

folder, moment = Path(sys.argv[1]), sys.argv[2]

def announce(moment_now):
    if moment_now == moment:
        kill_matrix_preload.announce(0.05 if moment == "reporting" else 3)

class Reporting:
    def __reduce__(self):
        announce("reporting")
        return str, ()

def train():
    import atexit, torch
    atexit.register(announce, "tearing down")
    for words in (["sleep", "1000"], ["setsid", "sleep", "1000"], ["env", "-i", "setsid", "sleep", "1000"]):
        subprocess.Popen(words)
    subprocess.run(["sh", "-c", "env -i setsid sleep 1000 &"])
    announce("running")
    return Reporting(), torch.ones(2**28, dtype=torch.uint8) if moment == "reporting" else None

ray.init(os.environ["CLUSTER"], log_to_driver=False)
launcher = trx.Launcher(
    workers_per_host=2, linger=0, shutdown_timeout=1,
    preload=("torch", "torch.distributed", "kill_matrix_preload"),
    extra_env_vars={"KILL_MATRIX_FOLDER": str(folder), "KILL_MATRIX_MOMENT": moment},
    runtime_env={"env_vars": {"PYTHONPATH": str(folder.parent)}},
    hostnames=1,
)
try:
    launcher.run(train)
except Exception as error:
    (folder / "outcome").write_text(type(error).__name__)
    print(error)
else:
    (folder / "outcome").write_text("returned")
"""

PRELOAD = """
import json, os, time
from pathlib import Path
import torch.distributed as dist

folder, moment = Path(os.environ["KILL_MATRIX_FOLDER"]), os.environ["KILL_MATRIX_MOMENT"]
join = dist.init_process_group

def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

def announce(then_sleep_s):
    template = os.getppid() if "RANK" in os.environ else os.getpid()
    keeper = parent(template)
    above = {"template": template, "keeper": keeper, "agent": parent(keeper)}
    note = {"pid": os.getpid(), "rank": int(os.environ.get("RANK", "-1")), **above}
    (folder / f".{os.getpid()}").write_text(json.dumps(note))
    (folder / f".{os.getpid()}").rename(folder / f"{os.getpid()}.json")
    time.sleep(then_sleep_s)

def join_late(*args, **kwargs):
    announce(3)
    join(*args, **kwargs)

if moment == "importing" and "KILL_MATRIX_DRIVER" not in os.environ:
    announce(3)
if moment == "forming":
    dist.init_process_group = join_late
"""

MOMENTS = ("importing", "forming", "running", "reporting", "tearing down")
ABOVE = ("keeper", "template", "agent", "driver", "raylet")
BELOW = ("worker", "all workers", "store", "children")
MAY_RAISE = {
    "worker": "WorkerFailedError",
    "all workers": "WorkerFailedError",
    "store": "AgentFailedError",
    "template": "AgentFailedError",
    "agent": "AgentFailedError",
    "raylet": "AgentFailedError",
    "driver": "killed",
    "children": "returned",
    "keeper": "returned",
}
CASES = [
    *(((victim,), moment) for moment in MOMENTS for victim in ABOVE),
    *(((victim,), moment) for moment in MOMENTS[1:] for victim in BELOW[:3]),
    *((("children",), moment) for moment in MOMENTS[2:]),
    *(
        (pair, "running")
        for pair in (
            ("keeper", "template"),
            ("keeper", "agent"),
            ("template", "agent"),
            ("agent", "driver"),
            ("agent", "raylet"),
            ("driver", "raylet"),
            ("worker", "template"),
            ("worker", "driver"),
        )
    ),
]


@dataclass
class Machine:
    """Two nodes and a record of what came of each case. The launches go to the second node."""

    cluster: Cluster
    node: Any
    outcomes: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])

    def raylet_pid(self) -> int:
        (raylet,) = self.node.all_processes["raylet"]
        return raylet.process.pid

    def renew_node(self) -> None:
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.node = self.cluster.add_node(num_cpus=2)


@pytest.fixture(scope="module")
def machine(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCHRUNX_RAY_TESTS", MARK)
        environment.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        with raylets({"num_cpus": 0}) as cluster:
            machine = Machine(cluster, cluster.add_node(num_cpus=2))
            launch_again()  # first touches of Ray's store
            yield machine
            machine.cluster.remove_node(machine.node)
    pytestconfig.stash.setdefault(SHOWN_AT_END, []).append(matrix(machine.outcomes))


def matrix(outcomes: dict[tuple[str, str], str]) -> str:
    victims = list(dict.fromkeys(victim for victim, _ in outcomes))
    lines = [f"{'killed':22}" + "".join(f"{moment:>20}" for moment in MOMENTS)]
    for victim in victims:
        cells = (outcomes.get((victim, moment), "-") for moment in MOMENTS)
        lines.append(f"{victim:22}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("victims", "moment"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_nothing_is_left(
    machine: Machine, victims: Sequence[str], moment: str, tmp_path: Path
) -> None:
    before = Traces.now()
    (tmp_path / "kill_matrix_preload.py").write_text(PRELOAD)
    folder = tmp_path / "notes"
    folder.mkdir()
    with (tmp_path / "said").open("wb") as said:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder), moment],
            env={
                **os.environ,
                "CLUSTER": machine.cluster.address,
                "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}",
                "KILL_MATRIX_FOLDER": str(folder),
                "KILL_MATRIX_MOMENT": moment,
                "KILL_MATRIX_DRIVER": "",
            },
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    announced = wait_for_notes(folder, 1 if moment == "importing" else 2)
    for pid in find(machine, victims, announced, driver.pid):
        kill(pid)
    killed_at = time.monotonic()

    driver.wait(20)
    took_s = time.monotonic() - killed_at
    outcome = (folder / "outcome").read_text() if (folder / "outcome").exists() else "killed"
    machine.outcomes["+".join(victims), moment] = f"{outcome} {took_s:.1f}"
    words = (tmp_path / "said").read_text()
    if "raylet" in victims:
        machine.renew_node()
        before.raylet_was_renewed()
    assert outcome in {*(MAY_RAISE[victim] for victim in victims), *may_also(moment)}, words
    # Of an agent that died with its raylet Ray tells only what it makes of the silence.
    assert took_s < (8 if outcome == "returned" or victims == ("agent", "raylet") else 3), words
    assert processes.wait_until(lambda: before.missing_from(Traces.now()) == [], 5), (
        before.missing_from(Traces.now())
    )
    assert launch_again() == 2


def may_also(moment: str) -> list[str]:
    """What every worker has delivered is not lost any more."""
    if moment == "importing":
        return ["AgentFailedError"]  # a keeper takes a template along that cannot hear of its end
    return ["returned"] if moment in ("reporting", "tearing down") else []


def launch_again() -> int:
    return len(trx.Launcher(hostnames=1, workers_per_host=2, linger=0).run(os.getpid))


def wait_for_notes(folder: Path, count: int) -> list[dict[str, int]]:
    """Who announced the moment, by rank."""
    assert processes.wait_until(lambda: len(list(folder.glob("*.json"))) == count, 30)
    notes = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(notes, key=lambda note: note["rank"])


def find(
    machine: Machine, victims: Sequence[str], announced: list[dict[str, int]], driver: int
) -> list[int]:
    above = announced[0]
    workers = [note["pid"] for note in announced]
    found: dict[str, Callable[[], list[int]]] = {
        "driver": lambda: [driver],
        "raylet": lambda: [machine.raylet_pid()],
        "agent": lambda: [above["agent"]],
        "keeper": lambda: [above["keeper"]],
        "template": lambda: [above["template"]],
        "store": lambda: [pid for pid in children(above["template"]) if is_store(pid, workers)],
        "worker": lambda: workers[-1:],
        "all workers": lambda: workers,
        "children": lambda: [
            pid
            for parent in (above["template"], *workers)
            for pid in children(parent)
            if "sleep" in words_or_none(pid)
        ],
    }
    return [pid for victim in victims for pid in found[victim]()]


def is_store(pid: int, workers: Sequence[int]) -> bool:
    return pid not in workers and "keeper" in words_or_none(pid)


def children(parent: int) -> list[int]:
    return [pid for pid in pids() if parent_or_none(pid) == parent]


def parent_or_none(pid: int) -> int | None:
    try:
        return processes.parent(pid)
    except OSError:
        return None


def words_or_none(pid: int) -> str:
    try:
        return processes.command_line(pid)
    except OSError:
        return ""


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # of a pair, the second ended with the first


@dataclass
class Traces:
    """What a launch could leave on this machine."""

    processes: dict[tuple[int, str], str]
    groups: list[str]
    free: dict[str, float]
    shared_memory: list[str]
    temporary: list[str]
    objects: int
    knows_store: bool = True

    @classmethod
    def now(cls) -> "Traces":
        groups: dict[str, Any] = ray.util.placement_group_table()
        return cls(
            processes=dict(started_processes()),
            groups=[g["name"] for g in groups.values() if g["state"] != "REMOVED"],
            free={k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")},
            shared_memory=[name for name in os.listdir("/dev/shm") if "plasma" not in name],
            temporary=os.listdir(os.environ["TMPDIR"]),
            objects=objects_in_store(),
        )

    def raylet_was_renewed(self) -> None:
        """Its own processes and its store are others now."""
        self.knows_store = False

    def missing_from(self, now: "Traces") -> list[str]:
        """What is there that was not; what was free and is not."""
        new = now.processes.keys() - self.processes.keys()
        left = [f"process {pid}: {now.processes[pid, start]}" for pid, start in new]
        if not self.knows_store:
            left = [line for line in left if not is_of_ray(line)]
        left += [f"placement group {name}" for name in now.groups]
        left += [f"/dev/shm/{name}" for name in set(now.shared_memory) - set(self.shared_memory)]
        left += [f"a temporary {name}" for name in set(now.temporary) - set(self.temporary)]
        if now.free != {"CPU": 2.0}:
            left.append(f"free: {now.free}")
        if now.objects > self.objects:
            left.append(f"{now.objects} objects in Ray's store")
        return left


def started_processes() -> Iterator[tuple[tuple[int, str], str]]:
    for pid in pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words = processes.command_line(pid)
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        # Kernel threads have no words; Ray's workers that wait for work come and go.
        is_rays = "ray::IDLE" in words or "default_worker" in words
        # What somebody else runs on this machine has an environment, without our mark.
        is_ours = not environment or f"TORCHRUNX_RAY_TESTS={MARK}".encode() in environment
        if words and fields[0] != "Z" and not is_rays and is_ours:
            yield (pid, fields[19]), words


def is_of_ray(line: str) -> bool:
    return "/ray/" in line or ("ray::" in line and "ray::Agent" not in line)


def objects_in_store() -> int:
    """In the stores of the nodes that answer; small ones do not lie there."""
    count = 0
    for node in ray.nodes():
        address, port = node["NodeManagerAddress"], node["NodeManagerPort"]
        try:
            stats: Any = node_stats(address, port, include_memory_info=False)
        except RpcError:
            continue
        count += stats.store_stats.num_local_objects
    return count
