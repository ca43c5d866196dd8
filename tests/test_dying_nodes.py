"""Nodes that die, or answer late, while a launch is placed on them or before its agents have begun."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import torchrunx_ray as trx
from tests.clusters.raylets import raylets
from tests.processes import command_line, wait_until
from tests.soon import soon

# Ray itself notices a killed raylet after 15 to 30 s.
pytestmark = [pytest.mark.exhaustive, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """No worker has room on it."""
    with raylets({"num_cpus": 0}) as cluster:
        yield cluster


@pytest.fixture
def nodes(head: Cluster) -> Iterator[Cluster]:
    """A cluster with two nodes of its own for each test."""
    for _ in range(2):
        head.add_node(num_cpus=2)
    assert wait_until(lambda: len(ids()) == 2)
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node)
    assert wait_until(lambda: ids() == [], 60)


def ids() -> list[str]:
    return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]


def signal_raylet(node_id: str, signal_number: int) -> None:
    (socket,) = [n["RayletSocketName"] for n in ray.nodes() if n["NodeID"] == node_id]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = command_line(int(entry.name))
            except OSError:
                continue
            if f"--raylet_socket_name={socket}" in command.split():
                os.kill(int(entry.name), signal_number)


def group(select: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    return next((g for g in ray.util.placement_group_table().values() if select(g)), None)


def test_node_that_was_asked_for_dies_while_the_launch_waits(nodes: Cluster) -> None:
    busy = trx.Launcher(hostnames=2, workers_per_host=2).session()
    wanted = ids()[1]
    waiting = trx.Launcher(hostnames=[wanted], workers_per_host=2).submit(os.getpid)
    assert wait_until(lambda: group(lambda g: g["state"] == "PENDING") is not None)
    signal_raylet(wanted, signal.SIGKILL)

    with pytest.raises(
        trx.PlacementError, match=f"{wanted}, chosen as one of the launch's hosts, left"
    ):
        waiting.result(timeout=60)
    busy.close()


def test_dead_node_is_seen_by_an_agent_that_something_else_started_for_ray(
    nodes: Cluster, tmp_path: Path
) -> None:
    """As `uv run` does, whose child then is no child of Ray's."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n{sys.executable} "$@"\nexit $?\n')
    python.chmod(0o755)

    def announce_and_sleep() -> None:
        (tmp_path / "runs").touch()
        time.sleep(1000)

    placed = ids()[0]
    launcher = trx.Launcher(hostnames=[placed], runtime_env={"py_executable": str(python)})
    run = launcher.submit(announce_and_sleep)
    assert wait_until((tmp_path / "runs").exists, 60)
    signal_raylet(placed, signal.SIGKILL)

    with soon(), pytest.raises(trx.AgentFailedError, match=r"the raylet\W+Ray's process"):
        run.result(timeout=60)


def test_launch_waits_on_when_a_node_dies_and_takes_its_successor(nodes: Cluster) -> None:
    busy = trx.Launcher(hostnames=2, workers_per_host=2).session()
    launcher = trx.Launcher(hostnames=1, workers_per_host=2, cpus_per_worker=1)
    waiting = launcher.submit(os.getpid)
    assert wait_until(lambda: group(lambda g: g["state"] == "PENDING") is not None)
    signal_raylet(ids()[1], signal.SIGKILL)
    nodes.add_node(num_cpus=2)

    assert len(waiting.result(timeout=60)) == 2
    busy.close()


def test_launch_that_ray_is_just_placing_does_not_wait_for_room(
    nodes: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that answered Ray late was taken for a full one, with a table that showed it free."""
    slow = ids()[1]
    signal_raylet(slow, signal.SIGSTOP)
    try:
        run = trx.Launcher(hostnames=[slow], workers_per_host=2).submit(os.getpid)
        assert wait_until(lambda: group(lambda g: g["state"] == "PENDING") is not None)
        assert not wait_until(lambda: "waiting for room" in caplog.text, 2)
    finally:
        signal_raylet(slow, signal.SIGCONT)
    assert len(run.result(timeout=60)) == 2


def test_launch_is_placed_again_when_a_node_dies_before_its_agent_begins(
    nodes: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = trx.Launcher(hostnames=1, workers_per_host=2, cpus_per_worker=1)
    with caplog.at_level(logging.WARNING, "torchrunx_ray"):
        run = launcher.submit(os.getpid)
        assert wait_until(lambda: group(lambda g: g["state"] == "CREATED") is not None, 10)
        placed = group(lambda g: g["state"] == "CREATED")
        assert placed is not None
        signal_raylet(placed["bundles_to_node_id"][0], signal.SIGKILL)

        assert len(run.result(timeout=100)) == 2
    assert "is lost: its node has left the cluster" in caplog.text


def test_session_goes_on_elsewhere_when_its_node_dies(nodes: Cluster) -> None:
    launcher = trx.Launcher(hostnames=1, workers_per_host=2, cpus_per_worker=1)
    with launcher.session() as session:
        session.run(os.getpid)
        placed = group(lambda g: g["state"] == "CREATED")
        assert placed is not None
        signal_raylet(placed["bundles_to_node_id"][0], signal.SIGKILL)

        assert len(session.run(os.getpid)) == 2


def test_session_that_found_no_room_for_a_dead_node_finds_it_later(nodes: Cluster) -> None:
    """It blamed others for the group that it had removed itself, for as long as it was open."""
    launcher = trx.Launcher(hostnames=1, workers_per_host=2, cpus_per_worker=1, placement_timeout=3)
    with launcher.session() as session:
        session.run(os.getpid)
        placed = group(lambda g: g["state"] == "CREATED")
        assert placed is not None
        with launcher.session():  # on the other node
            signal_raylet(placed["bundles_to_node_id"][0], signal.SIGKILL)
            for _ in range(2):
                with pytest.raises(trx.PlacementError, match="no room for this launch within"):
                    session.run(os.getpid)
        assert len(session.run(os.getpid)) == 2
