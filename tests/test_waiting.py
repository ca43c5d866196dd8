"""Launches of one driver that wait for each other's room."""

import dataclasses
import os
import random
import re
import socket
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import ray
from ray import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

import torchrunx_ray as trx
from tests.conftest import RunScript
from tests.processes import wait_until
from torchrunx_ray.driver.cluster import inventory as cluster_of_ray
from torchrunx_ray.driver.placing import queue, reminders
from torchrunx_ray.driver.placing import waiting as waiting_for_room

CPUS = 8


@pytest.mark.alone
def test_launches_that_wait_for_each_other_take_about_as_long_as_one_after_another(
    cluster: None,
) -> None:
    """Ray tries a group that waits once a second: of that second most was spent idle."""
    launcher = of_cpus(CPUS)
    launcher.run(int)
    begun = time.monotonic()
    for _ in range(10):
        launcher.run(int)
    one_after_another_s = time.monotonic() - begun

    begun = time.monotonic()
    for run in [launcher.submit(int) for _ in range(10)]:
        run.result()
    assert time.monotonic() - begun < 1.5 * one_after_another_s + 2


@pytest.mark.alone
def test_launch_begins_soon_after_the_one_that_it_waited_for(cluster: None) -> None:
    """Ray has just tried it: the next time would be a second later."""
    launcher = of_cpus(CPUS)
    launcher.run(int)

    def waited_s() -> float:
        session = launcher.session()
        run = launcher.submit(time.time)
        until_ray_has_just_tried_again()
        given_back = time.time()
        session.close()
        return max(run.result()) - given_back

    assert min(waited_s() for _ in range(5)) < 0.7


@pytest.mark.alone
def test_launch_that_fits_is_not_held_up_by_an_earlier_one_that_does_not(cluster: None) -> None:
    of_cpus(2).run(int)

    def waited_s() -> float:
        small, large = of_cpus(2).session(), of_cpus(6).session()
        too_large = of_cpus(CPUS).submit(int)
        assert wait_until(lambda: len(waiting()) == 1)
        fitting = of_cpus(6).submit(time.time)
        assert wait_until(lambda: len(waiting()) == 2)
        until_ray_has_just_tried_again()
        given_back = time.time()
        large.close()
        waited_s = max(fitting.result()) - given_back

        assert not too_large.done()
        small.close()
        too_large.result()
        return waited_s

    assert min(waited_s() for _ in range(3)) < 0.7


def test_launch_that_has_waited_for_long_is_preceded_by_none_that_could_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group: Any = "group"
    ours = queue._Queue()
    ours.releases = 1
    large, small = queue.Waiter({"CPU": 8}), queue.Waiter({"CPU": 2})
    ours.waiters = [large, small]
    assert list(ours._who_fits({"CPU": 2})) == [small]
    assert list(ours._who_fits({"CPU": 8})) == [large]

    large.since -= 3600
    assert list(ours._who_fits({"CPU": 2})) == [small]  # others hold the rest
    ours.held[group] = {"CPU": 6}
    assert list(ours._who_fits({"CPU": 2})) == []


@pytest.mark.slow
def test_nothing_is_lost_where_launches_that_wait_are_cancelled(cluster: None) -> None:
    rng = random.Random(1)
    launchers = [of_cpus(cpus) for cpus in (8, 4, 2)]
    launchers[0].run(int)
    runs = [rng.choice(launchers).submit(os.getpid) for _ in range(30)]
    for run in rng.sample(runs, 15):
        time.sleep(rng.random() / 10)
        run.cancel()
    for run in runs:
        try:
            run.result()
        except CancelledError:
            pass

    assert wait_until(lambda: ray.available_resources().get("CPU") == CPUS)
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}


def test_waiting_launch_whose_placement_group_was_removed_says_so(cluster: None) -> None:
    with of_cpus(CPUS).session():
        run = of_cpus(CPUS).submit(int)
        assert wait_until(lambda: len(waiting()) == 1)
        group_id = PlacementGroupID(bytes.fromhex(waiting()[0]["placement_group_id"]))
        remove_placement_group(PlacementGroup(group_id))
        with pytest.raises(
            trx.PlacementError, match=r"somebody removed the group.* Launch again\."
        ):
            run.result(timeout=30)


def test_launches_that_wait_at_once_are_told_in_one_warning(
    cluster: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty submits printed 45 tables within a second."""
    monkeypatch.setattr(reminders, "EVERY_S", 2)
    with of_cpus(CPUS).session():
        begun = time.monotonic()
        runs = [of_cpus(CPUS).submit(int) for _ in range(8)]
        assert wait_until(lambda: len(waiting()) == 8, 20)
        assert wait_until(lambda: "7 more launches of this driver wait" in caplog.text, 20)
        for run in runs:
            run.cancel()
        for run in runs:
            with pytest.raises(CancelledError):
                run.result()
        passed_s = time.monotonic() - begun
    said = [r.getMessage() for r in caplog.records if "waiting for room" in r.getMessage()]
    assert len(said) <= 2 + passed_s / 2


def test_launch_whose_room_ray_gives_while_the_driver_looks_around_does_not_say_that_it_waits(
    cluster: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_for_room, "_VERDICT_S", 0)
    for _ in range(5):
        of_cpus(CPUS).session().close()

    assert "is waiting" not in caplog.text


def test_launch_that_waits_for_a_session_of_its_own_script_names_it(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    node = f"on {socket.gethostname()}"
    advice = ": call session.run(...), or leave its `with` first."
    holder = dataclasses.replace(of_cpus(6), name="holder")
    waits = dataclasses.replace(of_cpus(4), placement_timeout=1)
    with holder.session(), pytest.raises(trx.PlacementError) as caught:
        waits.run(int)
    said = [r.getMessage() for r in caplog.records if "is waiting for room" in r.getMessage()]
    for text in (said[0], str(caught.value)):
        assert re.search(rf"^holder-\w+ of this script holds 6 CPU {node}", text, re.M), text
        assert text.endswith(advice)

    caplog.clear()
    group = placement_group([{"CPU": 6}])
    assert group.wait(30)
    with pytest.raises(trx.PlacementError) as of_others:
        dataclasses.replace(waits, placement_timeout=0.1).run(int)
    remove_placement_group(group)
    assert "of this script" not in caplog.text + str(of_others.value)


@pytest.mark.slow
def test_session_of_a_cluster_that_the_script_left_is_not_said_to_hold_anything(
    run_script: RunScript,
) -> None:
    done = run_script(
        """
import torchrunx_ray as trx
address = ray.get_runtime_context().gcs_address
launcher = trx.Launcher(hostnames=1, workers_per_host=1, backend=None, placement_timeout=1)
cpus = ray.cluster_resources()["CPU"]
stale = launcher.session().__enter__()
ray.shutdown()
ray.init(address)
group = ray.util.placement_group([{"CPU": cpus}])
assert group.wait(60)
try:
    launcher.run(int)
except trx.PlacementError as error:
    print("Others hold the missing resources" in str(error), "of this script" in str(error))
"""
    )
    assert done.stdout.splitlines()[-1:] == ["True False"], done.stderr
    assert "of this script" not in done.stderr


def test_session_that_holds_less_than_is_missing_is_named_beside_the_others(
    cluster: None,
) -> None:
    """Leaving it was all the advice, and would not have been enough."""
    group = placement_group([{"CPU": CPUS - 2}])
    assert group.wait(30)
    waits = dataclasses.replace(of_cpus(4), placement_timeout=0.1)
    with of_cpus(2).session(), pytest.raises(trx.PlacementError) as caught:
        waits.run(int)
    remove_placement_group(group)
    assert "of this script holds 2 CPU" in str(caught.value)
    assert "Others hold the missing resources" in str(caught.value)


def test_error_right_after_a_launch_shows_as_free_what_is_given_back(cluster: None) -> None:
    for _ in range(5):
        of_cpus(CPUS).run(int)
        with pytest.raises(trx.PlacementError) as caught:
            of_cpus(CPUS + 2).run(int)
        assert [free.get("CPU") for free in caught.value.free.values()] == [CPUS]


def test_workers_that_share_cpus_are_told_of_once(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = trx.Launcher(hostnames=1, workers_per_host=CPUS * 2 + 1, backend=None)
    for _ in range(2):
        launcher.session().close()

    said = [r.getMessage() for r in caplog.records if "share" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"17 workers share {CPUS} CPUs on ")
    assert "up to 3 on each CPU" in said[0]


@pytest.mark.slow
def test_workers_for_gpus_that_are_not_there_are_told_what_to_write(run_script: RunScript) -> None:
    """On a Ray that the script started, which no autoscaler will enlarge."""
    done = run_script(
        """
import torchrunx_ray as trx
for option in {}, {"hostnames": 1}, {"hostnames": ["localhost"]}:
    try:
        trx.Launcher(workers_per_host="gpu", **option).run(int)
    except trx.PlacementError as error:
        print("has no GPU" in str(error), str(error).splitlines()[-1])
""",
        own_ray={},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for said in lines:
        assert said.startswith('True Use workers_per_host="cpu", or a number of workers')
        assert "autoscaler" not in said


def of_cpus(cpus: int) -> trx.Launcher:
    return trx.Launcher(
        hostnames=1, workers_per_host=2, cpus_per_worker=cpus / 2, backend=None, log_handlers=None
    )


def waiting() -> list[dict[str, Any]]:
    return [group for group in placement_group_table().values() if group["state"] == "PENDING"]


def until_ray_has_just_tried_again() -> None:
    def attempts() -> list[int]:
        return [group["stats"]["scheduling_attempt"] for group in waiting()]

    assert wait_until(lambda: len(attempts()) > 0)
    before = attempts()
    assert wait_until(lambda: attempts() != before)


def test_launch_is_told_why_it_cannot_be_though_the_head_does_not_say_who_left(
    one: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is one that Ray may change: it is no public one."""
    monkeypatch.setattr(cluster_of_ray, "_raylet", None)
    with pytest.raises(trx.PlacementError, match="'nowhere' is not a live node"):
        dataclasses.replace(one, hostnames=["nowhere"]).run(os.getpid)
    with pytest.raises(trx.PlacementError, match="can never hold this launch"):
        dataclasses.replace(one, hostnames=1, gpus_per_worker=0, cpus_per_worker=1000).run(
            os.getpid
        )
