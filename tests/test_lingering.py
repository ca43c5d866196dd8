"""Agents that wait for another run after a failed one: for how long, and with what."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.clusters.raylets import raylets
from tests.processes import wait_until
from tests.traces import MARK, Traces
from tests.victims import MAY_RAISE, Driven

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.timeout(120)]

CPUS = 4
WITHOUT_TORCH: dict[str, Any] = {"workers_per_host": 2, "backend": None, "preload": ()}
LINGER_S = 3
WHOLE = {"worker": 2, "template": 2, "agent": 1}
"""How many of two agents live on, and serve another run, when one of these was killed."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a driver that finds a cluster of a head, on which no worker has room, and two nodes."""
    with pytest.MonkeyPatch.context() as ours:
        ours.setenv(MARK, uuid.uuid4().hex)
        ours.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        with raylets({"num_cpus": 0}, {"num_cpus": 2}, {"num_cpus": 2}) as cluster:
            launch_again()  # first touches of Ray's store
            yield {**os.environ, "CLUSTER": cluster.address}


@pytest.mark.parametrize(
    "victim",
    [
        "worker",
        *(pytest.param(victim, marks=pytest.mark.exhaustive) for victim in ("agent", "template")),
    ],
)
def test_agents_stay_for_their_time_and_hold_nothing(
    environment: dict[str, str], victim: str, tmp_path: Path
) -> None:
    before = Traces.now()
    driven = Driven("running", tmp_path, environment, hostnames=2, linger=LINGER_S, stays=True)
    assert outcome_of_killing(victim, driven) == MAY_RAISE[victim], driven.said

    assert wait_until(lambda: left(before, driven) == (WHOLE[victim], [])), left(before, driven)
    assert wait_until(lambda: left(before, driven) == (0, []), LINGER_S + 20), left(before, driven)
    driven.leave()
    assert wait_until(lambda: before.missing_from(Traces.now(), CPUS) == [])
    assert launch_again() == 4


@pytest.mark.parametrize("victim", [pytest.param("worker", marks=pytest.mark.exhaustive), "driver"])
def test_agents_go_at_once_with_their_driver(
    environment: dict[str, str], victim: str, tmp_path: Path
) -> None:
    before = Traces.now()
    driven = Driven("running", tmp_path, environment, hostnames=2, linger=1000, stays=True)
    assert outcome_of_killing(victim, driven) == MAY_RAISE[victim], driven.said
    if victim == "worker":
        assert left(before, driven)[0] == 2
    driven.leave()

    assert wait_until(lambda: before.missing_from(Traces.now(), CPUS) == []), before.missing_from(
        Traces.now(), CPUS
    )
    assert launch_again() == 4


def test_another_driver_has_the_room_while_agents_linger(environment: dict[str, str]) -> None:
    """And the agents serve their own driver's next run, in new processes, when it is done."""
    launcher = trx.Launcher(hostnames=2, linger=1000, **WITHOUT_TORCH)
    pids = list(launcher.run(lambda: (os.getppid(), os.getpid())))
    script = f"""
import os, ray, torchrunx_ray as trx
ray.init(os.environ["CLUSTER"], log_to_driver=False)
print(len(trx.Launcher(hostnames=2, placement_timeout=20, **{WITHOUT_TORCH}).run(os.getpid)))
"""
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert other.stdout == b"4\n", other.stderr.decode()

    again = list(launcher.run(lambda: (os.getppid(), os.getpid())))
    assert {template for template, _ in again} == {template for template, _ in pids}
    assert not {worker for _, worker in again} & {worker for _, worker in pids}
    launch_again()  # ends them


def launch_again() -> int:
    return len(trx.Launcher(hostnames=2, linger=0, **WITHOUT_TORCH).run(os.getpid))


def outcome_of_killing(victim: str, driven: Driven) -> str:
    driven.kill([victim])
    outcome, _took_s = driven.wait_for_outcome()
    return outcome


def left(before: Traces, driven: Driven) -> tuple[int, list[str]]:
    """How many agents, and what else than these, their keepers and templates, and the driver."""
    lines = before.missing_from(Traces.now(), CPUS)
    agents = [line for line in lines if "ray::Agent" in line]
    titles = [f"torchrunx_ray: {role} " for role in ("outer keeper", "keeper", "template")]
    expected = ("ray::Agent", *titles, f"process {driven.process.pid} ")
    others = [line for line in lines if not any(words in line for words in expected)]
    return len(agents), others
