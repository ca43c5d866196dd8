"""A driver that waits at a chosen moment of its launch, and whoever of that launch shall be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests import processes
from tests.processes import pids

_DRIVER = """
import json, os, subprocess, sys
from pathlib import Path
import victims_preload
import ray
import torchrunx_ray as trx
from tests.processes import note, wait_until

folder, moment, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def announce(moment_now):
    if moment_now == moment:
        victims_preload.announce()

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
    workers_per_host=2, shutdown_timeout=1,
    preload=("torch", "torch.distributed", "victims_preload"),
    extra_env_vars={"VICTIMS_FOLDER": str(folder), "VICTIMS_MOMENT": moment},
    runtime_env={"env_vars": {"PYTHONPATH": str(folder.parent)}},
    **options,
)
try:
    launcher.run(train)
except Exception as error:
    print(error, flush=True)
    note(folder / "outcome", type(error).__name__)
else:
    note(folder / "outcome", "returned")
wait_until(lambda: not (folder / "stay").exists(), 60)
"""

_PRELOAD = """
import json, os, time
from pathlib import Path

folder, moment = Path(os.environ["VICTIMS_FOLDER"]), os.environ["VICTIMS_MOMENT"]

def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

def announce():
    template = os.getppid() if "RANK" in os.environ else os.getpid()
    keeper = parent(template)
    outer_keeper = parent(keeper)
    agent = parent(outer_keeper)
    above = {"template": template, "keeper": keeper, "outer keeper": outer_keeper}
    above |= {"agent": agent, "raylet": parent(agent)}
    note = {"pid": os.getpid(), "rank": int(os.environ.get("RANK", "-1")), **above}
    (folder / f".{os.getpid()}").write_text(json.dumps(note))
    (folder / f".{os.getpid()}").rename(folder / f"{os.getpid()}.json")
    gate = "found" if moment == "reporting" else "go on"  # reports while the victims are killed
    while not (folder / gate).exists():
        time.sleep(0.01)

def join_late(*args, **kwargs):
    announce()
    join(*args, **kwargs)

if "VICTIMS_DRIVER" not in os.environ:  # the driver needs no torch, which costs 1 s of CPU
    import torch.distributed as dist

    join = dist.init_process_group
    if moment == "importing":
        announce()
    if moment == "forming":
        dist.init_process_group = join_late
"""

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
    "outer keeper": "returned",
}


def may_also(moment: str) -> list[str]:
    """What every worker has delivered is not lost any more."""
    return ["returned"] if moment in ("reporting", "tearing down") else []


def matrix(outcomes: Mapping[tuple[str, str], str], moments: Sequence[str]) -> str:
    """What came of each victim at each moment, for people."""
    victims = list(dict.fromkeys(victim for victim, _ in outcomes))
    lines = [f"{'killed':22}" + "".join(f"{moment:>22}" for moment in moments)]
    for victim in victims:
        cells = (outcomes.get((victim, moment), "-") for moment in moments)
        lines.append(f"{victim:22}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


class Driven:
    """A launch of two workers on each host, with victims on the last one."""

    def __init__(
        self,
        moment: str,
        folder: Path,
        environment: Mapping[str, str],
        *,
        hostnames: Sequence[str] | int,
        linger: float = 0,
        stays: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        """Start the driver; with `stays` it does not end before it is told to `leave`."""
        self._moment = moment
        self._folder = folder / "notes"
        self._folder.mkdir()
        (folder / "victims_preload.py").write_text(_PRELOAD)
        (folder / "driver.py").write_text(_DRIVER)
        if stays:
            (self._folder / "stay").touch()
        hosts = hostnames if isinstance(hostnames, int) else len(hostnames)
        self._announcements = 1 if moment == "importing" else 2 * hosts
        self._said = folder / "said"
        options = json.dumps({"hostnames": hostnames, "linger": linger})
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, folder / "driver.py", self._folder, moment, options],
                env={
                    **environment,
                    "PYTHONPATH": str(Path(__file__).parents[1]),
                    "VICTIMS_FOLDER": str(self._folder),
                    "VICTIMS_MOMENT": moment,
                    "VICTIMS_DRIVER": "",
                },
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def kill(self, victims: Sequence[str]) -> None:
        """Wait for the moment, and kill all of them at once."""
        found = self._find(victims, self._wait_for_moment())
        if self._moment == "reporting":
            (self._folder / "found").touch()
            time.sleep(0.03)
        killed = 0
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass  # of a pair, the second ended with the first
        assert killed or self._moment == "reporting", "who has reported may have ended"
        self._killed_at = time.monotonic()

    def wait_for_outcome(self) -> tuple[str, float]:
        """What the launch raised, or that it returned; and how long after the kill."""
        outcome = self._folder / "outcome"
        if not processes.wait_until(lambda: outcome.exists() or self._has_ended(), 1):
            (self._folder / "go on").touch()
            assert processes.wait_until(lambda: outcome.exists() or self._has_ended(), 20), (
                self.said
            )
        took_s = time.monotonic() - self._killed_at
        return outcome.read_text() if outcome.exists() else "killed", took_s

    def leave(self) -> None:
        """Have the driver end, and wait for that."""
        (self._folder / "stay").unlink(missing_ok=True)
        self.process.wait(20)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def _has_ended(self) -> bool:
        return self.process.poll() is not None

    def _wait_for_moment(self) -> list[dict[str, int]]:
        """Who announced it on the last host, by rank."""

        def notes() -> list[Path]:
            return list(self._folder.glob("*.json"))

        # Ray may take very long to start an actor on a busy machine.
        is_there = processes.wait_until(lambda: len(notes()) == self._announcements, 100)
        if not is_there:
            self.process.kill()  # the next case would find its hosts taken
        assert is_there, f"{len(notes())} of {self._announcements} announced it:\n{self.said}"
        announced = [json.loads(path.read_text()) for path in notes()]
        return sorted(announced, key=lambda note: note["rank"])[-2:]

    def _find(self, victims: Sequence[str], announced: list[dict[str, int]]) -> list[int]:
        above = announced[-1]
        workers = [note["pid"] for note in announced]
        found: dict[str, Callable[[], list[int]]] = {
            "driver": lambda: [self.process.pid],
            "store": lambda: [
                pid for pid in _children(above["template"]) if _is_store(pid, workers)
            ],
            "worker": lambda: workers[-1:],
            "all workers": lambda: workers,
            "children": lambda: [
                pid
                for parent in (above["template"], *workers)
                for pid in _children(parent)
                if "sleep" in _words_or_none(pid)
            ],
            **{
                name: lambda name=name: [above[name]]
                for name in ("template", "keeper", "outer keeper", "agent", "raylet")
            },
        }
        chosen = {victim: found[victim]() for victim in victims}
        assert all(chosen.values()), chosen
        return [pid for pids_of_one in chosen.values() for pid in pids_of_one]


def _is_store(pid: int, workers: Sequence[int]) -> bool:
    return pid not in workers and "torchrunx_ray: " in _words_or_none(pid)


def _children(parent: int) -> list[int]:
    return [pid for pid in pids() if _parent_or_none(pid) == parent]


def _parent_or_none(pid: int) -> int | None:
    try:
        return processes.parent(pid)
    except OSError:
        return None


def _words_or_none(pid: int) -> str:
    try:
        return processes.command_line(pid)
    except OSError:
        return ""
