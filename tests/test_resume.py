"""The example that resumes ends as if nothing had happened, whoever is killed meanwhile."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.clusters.raylets import raylets
from tests.processes import above, command_line, is_alive, pids, wait_until

EXAMPLE = Path(__file__).parents[1] / "examples" / "resume.py"


@pytest.fixture
def three() -> Iterator[Cluster]:
    with raylets({"num_cpus": 0}, *[{"num_cpus": 1}] * 3) as cluster:
        yield cluster


@pytest.mark.exhaustive
def test_resumed_training_ends_with_the_loss_of_an_undisturbed_one(
    three: Cluster, tmp_path: Path
) -> None:
    disturbed = start(three, tmp_path / "disturbed.pt")
    for attempt, whom in enumerate(("worker", "agent", "raylet")):
        wait_for_checkpoint(disturbed, tmp_path / "disturbed.pt")
        workers = workers_of(3)
        os.kill(victim(whom, workers[-1]), signal.SIGKILL)
        assert wait_until(lambda gone=workers: not any(map(is_alive, gone)), 30), attempt
    attempts, loss = outcome(disturbed)
    _, undisturbed_loss = outcome(start(three, tmp_path / "undisturbed.pt"))

    assert attempts == [
        "attempt 0: 3 workers, failed",
        "attempt 1: 3 workers, failed",
        "attempt 2: 3 workers, host lost",
        "attempt 3: 2 workers, returned",
    ]
    assert loss == pytest.approx(undisturbed_loss, rel=1e-3)
    assert not list(tmp_path.glob("*.pt.*"))


Example = "subprocess.Popen[str]"


def start(cluster: Cluster, checkpoint: Path) -> Example:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), str(checkpoint), "--steps", "600"],
        # The hosts share this machine's cores.
        env={**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def outcome(example: Example) -> tuple[list[str], float]:
    """Return the attempts and the final loss."""
    said = example.communicate(timeout=60)[0]
    assert example.returncode == 0, said
    attempts = re.findall(r"^attempt \d: .*", said, re.M)  # Ray prints here too
    (loss,) = re.findall(r"^final loss (.*)", said, re.M)
    return attempts, float(loss)


def wait_for_checkpoint(example: Example, path: Path) -> None:
    """Wait until the training has saved once more."""

    def when() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    last = when()
    assert wait_until(lambda: when() != last or example.poll() is not None, 60)
    assert example.poll() is None, "the training ended too soon"


def workers_of(count: int) -> list[int]:
    """Return the pids of the workers by rank."""

    def ranks() -> dict[int, int]:
        titles = ((pid, re.search(r"worker rank (\d+) of train-", title_of(pid))) for pid in pids())
        return {int(title[1]): pid for pid, title in titles if title}

    assert wait_until(lambda: len(ranks()) == count, 30), ranks()
    return [pid for _, pid in sorted(ranks().items())]


def title_of(pid: int) -> str:
    try:
        return command_line(pid)
    except OSError:
        return ""


def victim(whom: str, worker: int) -> int:
    if whom == "worker":
        return worker
    agent = above(worker)["agent"]
    if whom == "agent":
        return agent
    variables = Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
    (raylet,) = (each[15:] for each in variables if each.startswith(b"RAY_RAYLET_PID="))
    return int(raylet)
