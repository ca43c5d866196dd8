"""Runs that go on when an agent or a node is lost: at a fixed size, with spares, and at a size that may change."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import torchrunx_ray as trx
from tests.clusters.raylets import raylets
from tests.processes import above, command_line, is_alive, note, wait_until
from torchrunx_ray.driver.run import Run


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """No worker has room on it. It takes a silent node for dead after 6 s; by default that takes 15 s."""
    patience = {"health_check_period_ms": 1000, "health_check_initial_delay_ms": 1000}
    with raylets({"num_cpus": 0, "_system_config": patience}) as cluster:
        yield cluster


@pytest.fixture
def three(head: Cluster) -> Iterator[Cluster]:
    """A cluster with three nodes, each with room for one host."""
    for _ in range(3 - len(ids())):
        head.add_node(num_cpus=2)
    yield head
    assert wait_until(lambda: len(ids()) == living(head), 30)
    assert wait_until(lambda: ray.available_resources().get("CPU", 0) == 2 * len(ids()), 30)


def living(head: Cluster) -> int:
    """Number of nodes whose raylet lives, whether Ray knows it or not."""
    raylets_of = [node.all_processes["raylet"][0].process for node in head.worker_nodes]
    return sum(process.poll() is None for process in raylets_of)


def ids() -> list[str]:
    return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]


@dataclass(frozen=True)
class Seen:
    """What a rank saw of its attempt."""

    attempt: int
    restarts: int
    rank: int
    world_size: int
    raylet: int
    """Pid of the node's raylet, by which tests tell nodes apart."""


def announce_and_wait(folder: Path) -> Seen:
    """Note this rank of this attempt, and wait until somebody says that it may return."""
    context = trx.context()
    seen = Seen(
        context.attempt, context.restarts, context.rank, context.world_size, raylet_of(os.getpid())
    )
    note(folder / f"{context.attempt}.{context.rank}", f"{seen.raylet} {os.getpid()}")
    while not (folder / f"return {context.attempt}").exists():
        time.sleep(0.01)
    return seen


def raylet_of(worker: int) -> int:
    variables = Path(f"/proc/{above(worker)['agent']}/environ").read_bytes().split(b"\0")
    (pid,) = (each[15:] for each in variables if each.startswith(b"RAY_RAYLET_PID="))
    return int(pid)


def started(folder: Path, attempt: int) -> dict[int, tuple[int, int]]:
    """Pids of the raylet and the worker of each rank of an attempt that has begun its function."""
    found: dict[int, tuple[int, int]] = {}
    for path in folder.glob(f"{attempt}.*"):
        raylet, pid = path.read_text().split()
        found[int(path.name.partition(".")[2])] = int(raylet), int(pid)
    return found


def finish(run: "Run[Seen]", folder: Path, attempt: int) -> list[Seen]:
    (folder / f"return {attempt}").touch()
    return list(run.result(timeout=60))


def test_lost_node_at_a_fixed_size_is_replaced_and_the_others_keep_their_ranks(
    three: Cluster, tmp_path: Path
) -> None:
    launcher = trx.Launcher(hostnames=2, workers_per_host=1, cpus_per_worker=2, max_restarts=1)
    run = launcher.submit(announce_and_wait, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    first = started(tmp_path, 0)
    os.kill(first[0][0], signal.SIGKILL)
    lost_at = time.monotonic()

    assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
    took_s = time.monotonic() - lost_at
    seen = finish(run, tmp_path, 1)
    assert [(s.attempt, s.restarts, s.rank, s.world_size) for s in seen] == [
        (1, 1, 0, 2),
        (1, 1, 1, 2),
    ]
    assert seen[1].raylet == first[1][0]
    assert seen[0].raylet not in {first[0][0], first[1][0]}
    assert not any(is_alive(pid) for _, pid in first.values())
    assert took_s < 10


def test_elastic_run_goes_on_without_a_lost_node_and_does_not_count_it(
    three: Cluster, tmp_path: Path
) -> None:
    launcher = trx.Launcher(hostnames=(1, 2), workers_per_host=1, cpus_per_worker=2)
    run = launcher.submit(announce_and_wait, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    first = started(tmp_path, 0)
    with trx.Launcher(hostnames=1, workers_per_host=1, cpus_per_worker=2).session():
        os.kill(first[0][0], signal.SIGKILL)
        lost_at = time.monotonic()
        assert wait_until(lambda: len(started(tmp_path, 1)) == 1, 60)
        took_s = time.monotonic() - lost_at
        (seen,) = finish(run, tmp_path, 1)
    assert (seen.attempt, seen.restarts, seen.rank, seen.world_size) == (1, 0, 0, 1)
    assert seen.raylet == first[1][0]
    assert not any(is_alive(pid) for _, pid in first.values())
    assert took_s < 5


def test_spare_that_is_not_warm_yet_takes_the_place_of_a_lost_host(
    growing: Cluster, tmp_path: Path
) -> None:
    growing.add_node(num_cpus=2)
    launcher = trx.Launcher(
        hostnames=2, workers_per_host=1, cpus_per_worker=2, max_restarts=1, spares=1
    )
    run = launcher.submit(announce_and_wait, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    growing.add_node(num_cpus=2)
    assert wait_until(lambda: groups() == 2, 60)
    os.kill(started(tmp_path, 0)[1][0], signal.SIGKILL)

    assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
    finish(run, tmp_path, 1)


def groups() -> int:
    """Return the number of placement groups that have their resources."""
    table: dict[str, Any] = ray.util.placement_group_table()
    return sum(group["state"] == "CREATED" for group in table.values())


@pytest.mark.slow
def test_run_goes_on_if_the_agent_of_a_killed_raylet_ends_before_it_can_report(
    three: Cluster, tmp_path: Path
) -> None:
    launcher = trx.Launcher(hostnames=(1, 2), workers_per_host=1, cpus_per_worker=2)
    run = launcher.submit(announce_and_wait, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    first = started(tmp_path, 0)
    raylet, worker = first[1]
    keeper = above(worker)["outer keeper"]
    os.kill(keeper, signal.SIGSTOP)  # the agent waits for it until Ray ends the agent
    os.kill(raylet, signal.SIGKILL)

    assert wait_until(lambda: started(tmp_path, 1).get(0, first[0])[1] != first[0][1], 60)
    assert not any(is_alive(pid) for _, pid in first.values())
    os.kill(keeper, signal.SIGKILL)
    assert {seen.attempt for seen in finish(run, tmp_path, 1)} == {1}


def test_spare_takes_the_place_of_a_killed_agent_whose_host_becomes_the_spare(
    three: Cluster, tmp_path: Path
) -> None:
    launcher = trx.Launcher(
        hostnames=2, workers_per_host=1, cpus_per_worker=2, max_restarts=1, spares=1
    )
    run = launcher.submit(announce_and_wait, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    first = started(tmp_path, 0)
    assert wait_until(lambda: len(list(run.spares)) == 1, 60)
    (spare,) = run.spares
    os.kill(above(first[1][1])["agent"], signal.SIGKILL)
    lost_at = time.monotonic()

    assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
    took_s = time.monotonic() - lost_at
    second = started(tmp_path, 1)
    assert second[0][0] == first[0][0]
    assert second[1][0] not in {first[0][0], first[1][0]}
    assert wait_until(lambda: len(list(run.spares)) == 1, 60)
    assert list(run.spares) != [spare]
    finish(run, tmp_path, 1)
    assert took_s < 4


def run_until_asked(folder: Path) -> tuple[int, int, str | None]:
    """Note this rank of this attempt, and return when asked to stop, or when somebody says so."""
    context = trx.context()
    note(folder / f"{context.attempt}.{context.rank}", f"{raylet_of(os.getpid())} {os.getpid()}")
    while not (folder / f"return {context.attempt}").exists():
        if (asked := context.stop_asked) is not None:
            note(
                folder / f"asked {context.attempt}",
                f"{asked.reason} {asked.deadline} {time.time()}",
            )
            break
        time.sleep(0.01)
    return context.attempt, context.world_size, None if asked is None else asked.reason


@pytest.fixture
def growing(head: Cluster) -> Iterator[Cluster]:
    """A cluster with one node, to which tests add others."""
    for node in list(head.worker_nodes):
        head.remove_node(node)
    assert wait_until(lambda: not ids(), 60)
    head.add_node(num_cpus=2)
    yield head
    assert wait_until(lambda: ray.available_resources().get("CPU", 0) == 2 * len(ids()), 30)


def test_elastic_run_grows_when_a_node_joins(growing: Cluster, tmp_path: Path) -> None:
    launcher = trx.Launcher(
        hostnames=(1, 3), workers_per_host=1, cpus_per_worker=2, resize_interval=1
    )
    run = launcher.submit(run_until_asked, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 1, 60)
    growing.add_node(num_cpus=2)
    joined_at = time.monotonic()
    assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
    took_s = time.monotonic() - joined_at
    (tmp_path / "return 1").touch()
    result = run.result(timeout=60)

    assert list(result) == [(1, 2, None), (1, 2, None)]
    assert (tmp_path / "asked 0").read_text().startswith("resize ")
    assert started(tmp_path, 1)[0][0] == started(tmp_path, 0)[0][0]
    assert [(each.why, each.world_size) for each in result.attempts] == [
        ("resized", 1),
        ("returned", 2),
    ]
    assert took_s < 10


def test_drained_node_is_left_in_time_and_not_counted(three: Cluster, tmp_path: Path) -> None:
    launcher = trx.Launcher(
        hostnames=2, workers_per_host=1, cpus_per_worker=2, max_restarts=1, shutdown_timeout=2
    )
    run = launcher.submit(run_until_asked, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    first = started(tmp_path, 0)
    drain(node_of(first[1][0]), within_s=20)
    assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
    (tmp_path / "return 1").touch()
    result = run.result(timeout=60)

    reason, deadline, asked_at = (tmp_path / "asked 0").read_text().split()
    assert reason == "drain"
    assert 10 < float(deadline) - float(asked_at) <= 18
    second = started(tmp_path, 1)
    assert second[0][0] == first[0][0]
    assert second[1][0] not in {first[0][0], first[1][0]}
    assert [each.why for each in result.attempts] == ["drained", "returned"]
    three.remove_node(next(node for node in three.worker_nodes if raylet_pid(node) == first[1][0]))


def node_of(raylet: int) -> str:
    (node_id,) = (
        word[len("--node_id=") :]
        for word in command_line(raylet).split()
        if word.startswith("--node_id=")
    )
    return node_id


def raylet_pid(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def drain(node_id: str, within_s: int) -> None:
    address = ray.get_runtime_context().gcs_address
    options = ["--address", address, "--node-id", node_id, "--reason-message", "a test"]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *options, *reason]
    subprocess.run([*command, "--deadline-remaining-seconds", str(within_s)], check=True)
