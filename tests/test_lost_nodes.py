"""Runs that go on when an agent or a node is lost: at a fixed size, with spares, and at a size that may change."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

import torchrunx_ray as trx
from tests.announced import Seen, announce_and_wait, raylet_of, run_until_asked, started
from tests.clusters.raylets import raylets
from tests.leases import until_renewed
from tests.nodes import SOON_DEAD, all_is_free, drain, groups, ids, node_of, raylet_pid
from tests.processes import above, frozen, is_alive, note, wait_until
from torchrunx_ray.driver.run import Run
from torchrunx_ray.driver.running import restart_policy

# A cluster of several raylets costs 10 s of CPU, and each new node 3 s.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """No worker has room on it."""
    with raylets({"num_cpus": 0, "_system_config": SOON_DEAD}) as cluster:
        yield cluster


@pytest.fixture
def three(head: Cluster) -> Iterator[Cluster]:
    """A cluster with three nodes, each with room for one host."""
    for _ in range(3 - len(ids())):
        head.add_node(num_cpus=2)
    yield head
    assert all_is_free(head)


def finish(run: "Run[Seen]", folder: Path, attempt: int) -> list[Seen]:
    return list(result_of(run, folder, attempt))


def result_of(run: "Run[Seen]", folder: Path, attempt: int) -> "trx.LaunchResult[Seen]":
    (folder / f"return {attempt}").touch()
    return run.result(timeout=60)


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
    assert took_s < 25


def test_elastic_run_goes_on_without_a_lost_node_and_does_not_count_it(
    three: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "torchrunx_ray")
    launcher = trx.Launcher(hostnames=(1, 2), workers_per_host=1, cpus_per_worker=2)
    run = launcher.submit(announce_and_wait, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    first = started(tmp_path, 0)
    told = next(r.getMessage() for r in caplog.records if "launching on" in r.getMessage())
    assert "launching on 2 hosts (" in told
    assert ") of 1 to 2: 2 workers, 0 GPUs, " in told
    with trx.Launcher(hostnames=1, workers_per_host=1, cpus_per_worker=2).session():
        os.kill(first[0][0], signal.SIGKILL)
        lost_at = time.monotonic()
        assert wait_until(lambda: len(started(tmp_path, 1)) == 1, 60)
        took_s = time.monotonic() - lost_at
        (seen,) = finish(run, tmp_path, 1)
    assert (seen.attempt, seen.restarts, seen.rank, seen.world_size) == (1, 0, 0, 1)
    assert seen.raylet == first[1][0]
    assert not any(is_alive(pid) for _, pid in first.values())
    assert took_s < 25


def raise_beside_a_lost_host(folder: Path) -> int:
    """Raise on rank 0. The host of the other rank may be lost as soon as the launch stops this rank."""
    context = trx.context()
    if context.attempt > 0:
        return context.restarts
    signal.signal(signal.SIGTERM, lambda *_: (folder / "stopping").touch())
    note(folder / f"0.{context.rank}", f"{raylet_of(os.getpid())} {os.getpid()}")
    if context.rank == 0:
        wait_until(lambda: len(started(folder, 0)) == 2, 60)
        raise ValueError("before the loss")
    wait_until(lambda: False, 1000)
    return -1


def test_exception_before_a_host_is_lost_counts_and_is_asked_about(
    three: Cluster, tmp_path: Path
) -> None:
    asked: list[BaseException] = []
    launcher = trx.Launcher(
        hostnames=(1, 2),
        workers_per_host=1,
        cpus_per_worker=2,
        backend=None,
        max_restarts=1,
        restart_if=lambda error: not asked.append(error),
    )
    run = launcher.submit(raise_beside_a_lost_host, tmp_path)
    assert wait_until((tmp_path / "stopping").exists, 60)
    os.kill(started(tmp_path, 0)[1][0], signal.SIGKILL)

    assert set(run.result(timeout=60)) == {1}
    assert [(type(each), each.args) for each in asked] == [(ValueError, ("before the loss",))]
    assert [each.why for each in run.attempts] == ["failed", "returned"]


@pytest.mark.exhaustive
def test_elastic_run_goes_on_without_a_host_that_is_frozen_as_a_whole(
    three: Cluster, tmp_path: Path
) -> None:
    """The kernel still accepts connections for the frozen raylet, and Ray calls the node alive for a minute."""
    launcher = trx.Launcher(
        hostnames=(1, 2), workers_per_host=1, cpus_per_worker=2, host_timeout=5, shutdown_timeout=1
    )
    run = launcher.submit(announce_and_wait, tmp_path)
    assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
    raylet, worker = started(tmp_path, 0)[1]
    until_renewed(worker, launcher.host_timeout)
    with frozen(raylet, *above(worker).values(), worker):
        frozen_at = time.monotonic()
        assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
        took_s = time.monotonic() - frozen_at
        result = result_of(run, tmp_path, 1)
    assert [each.why for each in result.attempts] == ["host lost", "returned"]
    assert raylet not in {seen.raylet for seen in result}
    assert took_s < 30


def take_the_node_down(folder: Path) -> None:
    context = trx.context()
    note(folder / f"{context.attempt}.{context.rank}", f"{raylet_of(os.getpid())} {os.getpid()}")
    if context.rank == 0:
        wait_until(lambda: len(started(folder, context.attempt)) == context.world_size, 60)
        os.kill(raylet_of(os.getpid()), signal.SIGKILL)
    time.sleep(1000)


def test_function_that_takes_its_node_down_each_time_does_not_restart_for_ever(
    three: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart_policy, "_MOST_LOSSES", 1)
    launcher = trx.Launcher(hostnames=(1, 2), workers_per_host=1, cpus_per_worker=2)
    run = launcher.submit(take_the_node_down, tmp_path)

    with pytest.raises(trx.AgentFailedError) as caught:
        run.result(timeout=90)
    assert [each.why for each in run.attempts] == ["host lost", "host lost"]
    told = "\n".join(caught.value.__notes__)
    assert "2 attempts in a row have lost a host less than 60 s after they began" in told


def test_launch_that_waits_for_a_lost_host_keeps_no_other_from_its_room(
    three: Cluster, tmp_path: Path
) -> None:
    """Ray's head tried to move the lost bundle without a pause, and placed no other group."""
    launcher = trx.Launcher(hostnames=2, workers_per_host=1, cpus_per_worker=2, max_restarts=1)
    with trx.Launcher(hostnames=1, workers_per_host=1, cpus_per_worker=2).session() as busy:
        busy.run(int)
        run = launcher.submit(announce_and_wait, tmp_path)
        assert wait_until(lambda: len(started(tmp_path, 0)) == 2, 60)
        os.kill(started(tmp_path, 0)[1][0], signal.SIGKILL)
        assert wait_until(lambda: len(ids()) == 2, 60)
        small = placement_group([{"memory": 1}])
        assert small.wait(10)
        remove_placement_group(small)
    assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
    finish(run, tmp_path, 1)


@pytest.mark.exhaustive
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
    assert wait_until(lambda: len(groups("CREATED")) == 2, 60)
    os.kill(started(tmp_path, 0)[1][0], signal.SIGKILL)

    assert wait_until(lambda: len(started(tmp_path, 1)) == 2, 60)
    finish(run, tmp_path, 1)


@pytest.mark.exhaustive
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
    assert took_s < 25


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
    assert took_s < 25


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


def test_elastic_run_begins_without_hosts_that_cannot_serve(
    three: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only one host finds what its env_file needs."""
    env_file = tmp_path / "env"
    env_file.write_text(f"mkdir {tmp_path}/taken || {{ echo 'not on this host' >&2; false; }}\n")
    launcher = trx.Launcher(
        hostnames=(1, 3), workers_per_host=1, cpus_per_worker=2, env_file=env_file, linger=0
    )

    assert [seen.world_size for seen in launcher.run(see)] == [1]
    assert "goes on without" in caplog.text
    assert "not on this host" in caplog.text


def see() -> Seen:
    context = trx.context()
    return Seen(context.attempt, context.restarts, context.rank, context.world_size, 0)
