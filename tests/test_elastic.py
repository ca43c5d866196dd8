"""Runs that go on when hosts come and go: what may go wrong meanwhile, and what nobody must notice."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import torchrunx_ray as trx
from tests.announced import (
    Seen,
    announce_and_wait,
    raylet_of,
    raylets_by_rank,
    run_until_asked,
    started,
)
from tests.clusters.raylets import raylets
from tests.nodes import (
    SOON_DEAD,
    all_is_free,
    drain,
    groups,
    ids,
    living,
    node_of,
    raylet_pid,
)
from tests.processes import above, command_line, is_alive, note, parent, pids, wait_until
from torchrunx_ray.driver.run import Run
from torchrunx_ray.driver.run import _living as living_runs

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """No worker has room on it."""
    with raylets({"num_cpus": 0, "_system_config": SOON_DEAD}) as cluster:
        yield cluster


@pytest.fixture
def three(head: Cluster) -> Iterator[Cluster]:
    with nodes(head, 3):
        yield head


@pytest.fixture
def two(head: Cluster) -> Iterator[Cluster]:
    with nodes(head, 2):
        yield head


@pytest.fixture
def single(head: Cluster) -> Iterator[Cluster]:
    with nodes(head, 1):
        yield head


@contextlib.contextmanager
def nodes(head: Cluster, count: int) -> Iterator[None]:
    """Have so many nodes, each with room for one host. After the test they are free again."""
    for node in list(head.worker_nodes):
        if node.all_processes["raylet"][0].process.poll() is not None or living(head) > count:
            head.remove_node(node)
    while living(head) < count:
        add(head)
    assert wait_until(lambda: len(ids()) == count, 60)
    yield
    for left in list(living_runs):  # after a test that failed
        left.kill()
        left.wait()
    assert all_is_free(head), (ray.available_resources(), groups("PENDING", "CREATED"))
    assert groups("PENDING", "RESCHEDULING", "CREATED") == []


def add(head: Cluster) -> int:
    """Add a node; return the pid of its raylet."""
    return raylet_pid(head.add_node(num_cpus=2, num_gpus=2))


def launcher(**options: Any) -> trx.Launcher:
    """One worker on each host, and one host on each node."""
    fixed = {"workers_per_host": 1, "cpus_per_worker": 2, "gpus_per_worker": 0}
    return trx.Launcher(**{**fixed, "shutdown_timeout": 2, **options})


def have_started(folder: Path, attempt: int, count: int) -> list[int]:
    """Wait for all ranks of an attempt; return the pids of their raylets."""
    assert wait_until(lambda: len(started(folder, attempt)) == count, 60)
    return raylets_by_rank(folder, attempt)


def finish(run: "Run[Any]", folder: Path, attempt: int) -> "trx.LaunchResult[Any]":
    (folder / f"return {attempt}").touch()
    return run.result(timeout=60)


def kill(raylet: int) -> None:
    os.kill(raylet, signal.SIGKILL)


def raylet() -> int:
    """Return the pid of the raylet of the worker that calls this."""
    return raylet_of(os.getpid())


def agents_on(of_raylet: int) -> list[int]:
    """Pids of the agents on a node."""
    found: list[int] = []
    for pid in pids():
        with contextlib.suppress(OSError):
            if parent(pid) == of_raylet and command_line(pid).startswith("ray::Agent"):
                found.append(pid)
    return found


# Attempts that fail in an awkward moment.


class SlowToReport:
    """A value that a worker reports only after somebody says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        note(self.folder / "reporting", os.getpid())
        while not (self.folder / "report").exists():
            time.sleep(0.01)
        return int, (0,)


def test_values_of_an_attempt_that_fails_while_it_reports_are_discarded(
    three: Cluster, tmp_path: Path
) -> None:
    def report() -> Any:
        attempt, rank = trx.context().attempt, trx.context().rank
        note(tmp_path / f"{attempt}.{rank}", f"{raylet()} {os.getpid()}")
        if attempt == 0 and rank == 1:
            return SlowToReport(tmp_path)
        return attempt, b"x" * 2**20

    run = launcher(hostnames=2, max_restarts=1).submit(report)
    first = have_started(tmp_path, 0, 2)
    assert wait_until((tmp_path / "reporting").exists, 60)
    kill(first[1])

    assert [attempt for attempt, _ in run.result(timeout=60)] == [1, 1]


def test_second_host_is_lost_while_the_first_is_being_replaced(
    three: Cluster, tmp_path: Path
) -> None:
    run = launcher(hostnames=2, max_restarts=1).submit(announce_and_wait, tmp_path)
    first = have_started(tmp_path, 0, 2)
    with launcher(hostnames=1).session():
        kill(first[0])
        assert wait_until(lambda: groups("PENDING") != [], 30)
        kill(first[1])
        assert wait_until(lambda: len(ids()) == 1, 60)
    added = add(three)
    second = have_started(tmp_path, 1, 2)

    assert added in second
    assert not {*first} & {*second}
    assert [each.rank for each in finish(run, tmp_path, 1)] == [0, 1]


def test_two_lost_hosts_do_not_share_the_node_that_has_room_for_both(
    two: Cluster, tmp_path: Path
) -> None:
    run = launcher(hostnames=2, max_restarts=1).submit(announce_and_wait, tmp_path)
    first = have_started(tmp_path, 0, 2)
    for each in first:
        kill(each)
    large = two.add_node(num_cpus=4)
    try:
        assert wait_until(lambda: groups("CREATED") != [], 60)
        small = add(two)
        second = have_started(tmp_path, 1, 2)

        assert {*second} == {raylet_pid(large), small}
        finish(run, tmp_path, 1)
    finally:
        two.remove_node(large)


# Ends of a run that is between two attempts.


def named_actors() -> list[str]:
    actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == "torchrunx_ray"]


def named_agents() -> list[str]:
    """Return the actors that end with a run: the driver's pulse stays until the driver ends."""
    return [name for name in named_actors() if name.startswith("agent-")]


@pytest.mark.parametrize("end", ["cancel", "kill"])
def test_run_that_waits_for_room_for_a_lost_host_ends_promptly(
    three: Cluster, tmp_path: Path, end: str
) -> None:
    run = launcher(hostnames=2, max_restarts=1, linger=0).submit(announce_and_wait, tmp_path)
    first = have_started(tmp_path, 0, 2)
    busy = launcher(hostnames=1, linger=0).session()
    kill(first[1])
    assert wait_until(lambda: groups("PENDING") != [], 30)

    getattr(run, end)()
    assert wait_until(run.done, 15)
    assert run.cancelled()
    with pytest.raises(CancelledError):
        run.result()
    assert groups("PENDING", "RESCHEDULING") == []
    busy.close()
    assert wait_until(
        lambda: named_agents() == [], 60
    )  # Ray may have to notice that the node is dead


def test_run_that_finds_no_room_for_a_lost_host_tells_for_how_long_it_has_waited(
    three: Cluster, tmp_path: Path
) -> None:
    """The error told of a limit of 0 s, the time left to the last request."""
    patient = launcher(hostnames=2, max_restarts=1, linger=0, placement_timeout=14)
    run = patient.submit(announce_and_wait, tmp_path)
    first = have_started(tmp_path, 0, 2)
    with launcher(hostnames=1, linger=0).session():
        kill(first[1])
        assert wait_until(lambda: "restarting 2 workers: 0/1 hosts, waiting" in repr(run), 30)
        with pytest.raises(trx.AgentFailedError) as caught:
            run.result(timeout=60)
    told = "\n".join(caught.value.__notes__)
    assert "No host could take the place of a lost one within placement_timeout=14 s" in told
    assert "=0 s" not in told


SCRIPT = """
import os, sys, time
from pathlib import Path
import ray, torchrunx_ray as trx
from tests.announced import announce_and_wait
from tests.nodes import groups
from tests.processes import wait_until
folder, moment, end = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
ray.init(log_to_driver=False)

def ask(error):
    (folder / "there").touch()
    time.sleep(1000)

run = trx.Launcher(
    hostnames=2, workers_per_host=1, cpus_per_worker=2, gpus_per_worker=0, max_restarts=1,
    restart_if=ask if moment == "restart_if" else None, shutdown_timeout=2,
).submit(announce_and_wait, folder)
if moment == "room":
    assert wait_until(lambda: groups("PENDING"), 90)
    (folder / "there").touch()
if end == "end":
    assert wait_until((folder / "there").exists, 90)
else:
    run.result()
"""


@pytest.mark.parametrize("moment", ["room", "restart_if"])
@pytest.mark.parametrize("end", ["end", "SIGINT", "SIGKILL"])
def test_driver_that_ends_between_two_attempts_leaves_nothing(
    three: Cluster, tmp_path: Path, moment: str, end: str
) -> None:
    address = ray.get_runtime_context().gcs_address
    before = set(named_actors())
    busy = launcher(hostnames=1, linger=0).session()
    with (tmp_path / "errors").open("w") as errors:
        script = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), moment, end],
            env={
                **os.environ,
                "RAY_ADDRESS": address,
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            stderr=errors,
        )
    try:
        kill(have_started(tmp_path, 0, 2)[1])
        assert wait_until((tmp_path / "there").exists, 60)
        if end != "end":
            script.send_signal(getattr(signal, end))
        script.wait(timeout=40)
    finally:
        script.kill()
        script.wait()
        print((tmp_path / "errors").read_text())
        busy.close()
    assert (script.returncode == 0) is (end == "end")
    assert wait_until(lambda: before.issuperset(named_actors()), 60)
    assert not any(is_alive(pid) for _, pid in started(tmp_path, 0).values())


# Sessions.


def ignore_requests(folder: Path) -> None:
    """Note this rank, and go on whatever the launch asks for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context = trx.context()
    note(folder / f"{context.attempt}.{context.rank}", f"{raylet()} {os.getpid()}")
    while not (folder / f"return {context.attempt}").exists():
        if context.stop_asked is not None:
            (folder / f"asked {context.attempt}").touch()
        time.sleep(0.01)


def test_session_that_is_left_while_it_grows_leaves_nothing(
    single: Cluster, tmp_path: Path
) -> None:
    grown = launcher(hostnames=(1, 2), resize_interval=0, shutdown_timeout=1, linger=0)
    with contextlib.suppress(ZeroDivisionError), grown.session() as session:
        run = session.submit(ignore_requests, tmp_path)
        have_started(tmp_path, 0, 1)
        add(single)
        assert wait_until((tmp_path / "asked 0").exists, 60)
        raise ZeroDivisionError
    assert run.cancelled()
    assert wait_until(lambda: named_agents() == [], 30)


@pytest.mark.parametrize("spares", [1, 0])
def test_host_that_a_session_loses_is_back_before_its_next_run(
    three: Cluster, tmp_path: Path, spares: int
) -> None:
    with launcher(hostnames=2, spares=spares).session() as session:
        run = session.submit(announce_and_wait, tmp_path)
        first = have_started(tmp_path, 0, 2)
        if spares:
            assert wait_until(lambda: len(run.spares) == 1, 60)
        finish(run, tmp_path, 0)
        kill(first[0])
        after = list(session.run(raylet))
    assert after[1] == first[1]
    assert after[0] not in first


def test_session_with_a_smallest_size_runs_on_what_is_there_and_grows_between_runs(
    single: Cluster,
) -> None:
    with launcher(hostnames=(1, 3)).session() as session:
        first = list(session.run(raylet))
        added = add(single)
        assert wait_until(lambda: len(ids()) == 2, 60)
        second = list(session.run(raylet))
        kill(first[0])
        third = list(session.run(raylet))
    assert (len(first), second, third) == (1, [*first, added], [added])


# Bundles that Ray has placed on another node.


def gpu_and_raylet() -> tuple[str, int]:
    return os.environ["CUDA_VISIBLE_DEVICES"], raylet()


def has_moved() -> bool:
    """Return True once Ray has placed the bundles of all groups again."""
    return len(groups("CREATED")) == 1 and groups("RESCHEDULING", "PENDING") == []


@contextlib.contextmanager
def first_gpu_is_taken(node_id: str) -> Iterator[None]:
    """Hold one of a node's two GPUs."""

    class Holder:
        def gpu(self) -> list[str]:
            return ray.get_runtime_context().get_accelerator_ids()["GPU"]

    untyped: Any = ray
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "num_gpus": 1, "scheduling_strategy": there}
    holder = untyped.remote(Holder).options(**options).remote()
    assert ray.get(holder.gpu.remote()) == ["0"]
    yield
    ray.kill(holder)


def test_bundle_that_moved_between_two_runs_has_the_gpus_and_agent_of_its_new_node(
    two: Cluster,
) -> None:
    one_gpu = launcher(hostnames=2, gpus_per_worker=1, backend="gloo")
    with one_gpu.session() as session:
        (_, dying), (gpu, staying) = session.run(gpu_and_raylet)
        added = add(two)
        with first_gpu_is_taken(node_of(added)):
            kill(dying)
            assert wait_until(lambda: len(ids()) == 2 and has_moved(), 60)
            assert list(session.run(gpu_and_raylet)) == [("1", added), (gpu, staying)]


def test_bundle_that_moved_between_two_attempts_has_the_gpus_of_its_new_node(
    two: Cluster, tmp_path: Path
) -> None:
    def announce() -> tuple[str, int]:
        seen = gpu_and_raylet()
        announce_and_wait(tmp_path)
        return seen

    def until_moved(_: BaseException) -> bool:
        return wait_until(lambda: len(ids()) == 2 and has_moved(), 60)

    options = {"gpus_per_worker": 1, "backend": "gloo", "max_restarts": 1}
    with launcher(hostnames=2).session() as busy:
        busy.run(int)
        # Ray moves the bundles of launches that had to wait for room: they were not pinned to nodes.
        run = launcher(hostnames=2, restart_if=until_moved, **options).submit(announce)
        assert wait_until(lambda: "waiting" in repr(run), 30)
    first = have_started(tmp_path, 0, 2)
    added = add(two)
    with first_gpu_is_taken(node_of(added)):
        kill(first[1])
        have_started(tmp_path, 1, 2)
        assert list(finish(run, tmp_path, 1)) == [("0", first[0]), ("1", added)]


def test_argument_that_died_with_its_node_is_told_once(two: Cluster, tmp_path: Path) -> None:
    def announce(value: bytes) -> Seen:
        assert len(value) == 10**6
        return announce_and_wait(tmp_path)

    untyped: Any = ray
    with launcher(hostnames=1, max_restarts=3).session() as session:
        there = NodeAffinitySchedulingStrategy(node_of(session.run(raylet).rank(0)), soft=False)
        once = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
        value = untyped.remote(lambda: b"x" * 10**6).options(**once).remote()
        run = session.submit(announce, value)
        kill(have_started(tmp_path, 0, 1)[0])
        with pytest.raises(trx.PayloadError) as caught:
            run.result(timeout=120)
    assert len(caught.value.attempts) == 2


# Spares.


def test_missing_spares_are_told_once_and_taken_when_there_is_room(
    three: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = launcher(hostnames=2, max_restarts=1, spares=3).submit(announce_and_wait, tmp_path)
    first = have_started(tmp_path, 0, 2)
    assert wait_until(lambda: len(run.spares) == 1, 60)
    assert wait_until(lambda: "no room for 2 more" in caplog.text)
    kill(first[0])
    second = have_started(tmp_path, 1, 2)
    assert run.spares == ()
    add(three)
    assert wait_until(lambda: len(run.spares) == 1, 60)
    assert second[1] == first[1]
    finish(run, tmp_path, 1)
    told = [r for r in caplog.records if "no room for" in r.getMessage()]
    assert [r.levelname for r in told] == ["WARNING"]


def test_spare_that_loses_its_agent_gets_another_and_one_that_loses_its_node_is_replaced(
    three: Cluster, tmp_path: Path
) -> None:
    run = launcher(hostnames=2, max_restarts=1, spares=1).submit(announce_and_wait, tmp_path)
    first = have_started(tmp_path, 0, 2)
    assert wait_until(lambda: len(run.spares) == 1, 60)
    (spare,) = (raylet_pid(n) for n in three.worker_nodes if raylet_pid(n) not in first)
    (agent,) = agents_on(spare)
    os.kill(agent, signal.SIGKILL)
    assert wait_until(lambda: len(run.spares) == 0, 30)
    assert wait_until(lambda: len(run.spares) == 1, 30)
    kill(spare)
    assert wait_until(lambda: len(run.spares) == 0, 30)
    added = add(three)
    assert wait_until(lambda: len(run.spares) == 1, 60)
    kill(first[1])
    assert have_started(tmp_path, 1, 2) == [first[0], added]
    finish(run, tmp_path, 1)


# Growing, shrinking, draining.


def test_function_that_ignores_all_requests_is_killed_at_a_resize_and_at_a_drain(
    single: Cluster, tmp_path: Path
) -> None:
    grown = launcher(hostnames=(1, 2), resize_interval=0, shutdown_timeout=1)
    run = grown.submit(ignore_requests, tmp_path)
    have_started(tmp_path, 0, 1)
    added = add(single)
    first, second = have_started(tmp_path, 1, 2)
    assert second == added
    drain(node_of(added), within_s=5)
    assert have_started(tmp_path, 2, 1) == [first]
    result = finish(run, tmp_path, 2)
    assert [each.why for each in result.attempts] == ["resized", "drained", "returned"]
    single.remove_node(next(n for n in single.worker_nodes if raylet_pid(n) == added))


@pytest.mark.parametrize("whose", ["this driver", "another driver"])
def test_growth_does_not_overtake_a_launch_that_waits(
    two: Cluster, tmp_path: Path, whose: str
) -> None:
    busy = launcher(hostnames=1).session()
    run = launcher(hostnames=(1, 2), resize_interval=0).submit(run_until_asked, tmp_path)
    have_started(tmp_path, 0, 1)
    if whose == "this driver":
        waiting = launcher(hostnames=1).submit(announce_and_wait, tmp_path / "other")
        (tmp_path / "other").mkdir()
        assert wait_until(lambda: groups("PENDING") != [], 30)
        busy.close()
        have_started(tmp_path / "other", 0, 1)
        assert started(tmp_path, 1) == {}
        finish(waiting, tmp_path / "other", 0)
    else:
        group = ray.util.placement_group([{"CPU": 2}])
        assert wait_until(lambda: groups("PENDING") != [], 30)
        busy.close()
        assert group.wait(30)
        assert started(tmp_path, 1) == {}
        ray.util.remove_placement_group(group)
    have_started(tmp_path, 1, 2)  # now that the resources are free
    finish(run, tmp_path, 1)


def test_run_grows_once_per_interval_and_hosts_that_join_get_the_last_ranks(
    single: Cluster, tmp_path: Path
) -> None:
    run = launcher(hostnames=(1, 3), resize_interval=6).submit(run_until_asked, tmp_path)
    first = have_started(tmp_path, 0, 1)
    first.append(add(single))
    assert have_started(tmp_path, 1, 2) == first
    first.append(add(single))
    assert have_started(tmp_path, 2, 3) == first
    result = finish(run, tmp_path, 2)
    one, two, _ = result.attempts
    assert [each.why for each in result.attempts] == ["resized", "resized", "returned"]
    assert one.ended - one.begun > 6
    assert two.ended - two.begun > 6


def test_middle_host_is_replaced_by_a_spare_and_all_keep_their_ranks(
    head: Cluster, tmp_path: Path
) -> None:
    with nodes(head, 4):
        run = launcher(hostnames=3, max_restarts=1, spares=1).submit(announce_and_wait, tmp_path)
        first = have_started(tmp_path, 0, 3)
        assert wait_until(lambda: len(run.spares) == 1, 60)
        kill(first[1])
        second = have_started(tmp_path, 1, 3)
        finish(run, tmp_path, 1)
    assert (second[0], second[2]) == (first[0], first[2])
    assert second[1] not in first


def test_hosts_close_up_without_a_spare_and_a_node_that_joins_gets_the_last_rank(
    three: Cluster, tmp_path: Path
) -> None:
    """Ray itself places the lost bundle on the new node, where no room is left then."""
    run = launcher(hostnames=(2, 3), resize_interval=2).submit(run_until_asked, tmp_path)
    first = have_started(tmp_path, 0, 3)
    kill(first[1])
    assert have_started(tmp_path, 1, 2) == [first[0], first[2]]
    assert wait_until(lambda: len(ids()) == 2, 60)
    added = add(three)
    assert have_started(tmp_path, 2, 3) == [first[0], first[2], added]
    result = finish(run, tmp_path, 2)
    assert [each.why for each in result.attempts] == ["host lost", "resized", "returned"]


def test_node_that_failed_twice_is_left_for_another_one(two: Cluster, tmp_path: Path) -> None:
    run = launcher(hostnames=1, max_restarts=3).submit(announce_and_wait, tmp_path)
    for attempt in (0, 1):
        have_started(tmp_path, attempt, 1)
        os.kill(above(started(tmp_path, attempt)[0][1])["agent"], signal.SIGKILL)
    ((third,),) = [have_started(tmp_path, 2, 1)]
    assert raylets_by_rank(tmp_path, 0) == raylets_by_rank(tmp_path, 1) != [third]
    finish(run, tmp_path, 2)


def worlds(folder: Path) -> tuple[int, str]:
    world, _ = os.environ["WORLD_SIZE"], run_until_asked(folder)
    return int(world), os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("options", "sizes", "gpus"),
    [
        ({"workers_per_host": "cpu", "cpus_per_worker": None}, (2, 6), ""),
        ({"workers_per_host": 2, "cpus_per_worker": 1}, (2, 4), ""),
        ({"workers_per_host": 2, "cpus_per_worker": 1, "gpus_per_worker": 0.5}, (2, 4), "0"),
    ],
    ids=["cpu", "number", "fraction of a GPU"],
)
def test_host_that_joins_has_workers_as_the_options_say(
    single: Cluster, tmp_path: Path, options: dict[str, Any], sizes: tuple[int, int], gpus: str
) -> None:
    grown = launcher(hostnames=(1, 2), resize_interval=0, backend="gloo", **options)
    run = grown.submit(worlds, tmp_path)
    have_started(tmp_path, 0, sizes[0])
    joining = single.add_node(num_cpus=4, num_gpus=2)
    have_started(tmp_path, 1, sizes[1])
    assert list(finish(run, tmp_path, 1)) == [(sizes[1], gpus)] * sizes[1]
    single.remove_node(joining)


def test_smallest_and_largest_size_may_be_equal(two: Cluster) -> None:
    result = launcher(hostnames=(2, 2)).run(raylet)
    assert len({*result}) == 2
