"""A session goes on after failures, and says where it cannot."""

import asyncio
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

import torchrunx_ray as trx
from tests import processes
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.running.hosts import Hosts


def tree() -> dict[str, int]:
    return processes.above(os.getpid())


def kill(victim: str) -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getpid() if victim == "worker" else tree()[victim], signal.SIGKILL)
    time.sleep(1000)


@pytest.mark.parametrize(
    ("victim", "error", "survivors"),
    [
        ("worker", trx.WorkerFailedError, {"agent", "outer keeper", "keeper", "template"}),
        ("template", trx.AgentFailedError, {"agent"}),
        pytest.param("agent", trx.AgentFailedError, set[str](), marks=pytest.mark.slow),
    ],
)
def test_next_run_works_and_only_what_died_is_replaced(
    cluster: None, victim: str, error: type[Exception], survivors: set[str]
) -> None:
    with trx.Launcher(workers_per_host=2).session() as session:
        before = session.run(tree).rank(0)
        for _ in range(2):
            with pytest.raises(error):
                session.run(kill, victim)
            after = session.run(tree).rank(1)
            assert {name for name in before if before[name] == after[name]} == survivors
            before = after


@pytest.mark.slow
def test_runs_of_a_session_take_the_environment_and_folder_as_they_are_then(
    cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of its first run were every run's, so that one value of a variable was measured n times."""

    def seen() -> tuple[str | None, str]:
        return os.environ.get("TORCH_OF_THIS_TEST"), os.getcwd()

    with trx.Launcher(workers_per_host=1, backend=None).session() as session:
        assert session.run(seen).rank(0) == (None, os.getcwd())
        monkeypatch.setenv("TORCH_OF_THIS_TEST", "1")
        monkeypatch.chdir(tmp_path)
        assert session.run(seen).rank(0) == ("1", str(tmp_path))
        monkeypatch.delenv("TORCH_OF_THIS_TEST")
        assert session.run(seen).rank(0) == (None, str(tmp_path))


def test_session_whose_room_was_taken_away_says_so(cluster: None) -> None:
    with trx.Launcher(workers_per_host=2, name="robbed").session() as session:
        session.run(os.getpid)
        (name,) = [
            group["name"]
            for group in ray.util.placement_group_table().values()
            if group["name"].startswith("robbed") and group["state"] == "CREATED"
        ]
        untyped: Any = ray
        untyped.util.remove_placement_group(untyped.util.get_placement_group(name))

        with pytest.raises(trx.PlacementError, match="was removed, by ray"):
            session.run(os.getpid)


def test_session_says_where_it_is_and_what_it_does(cluster: None) -> None:
    with trx.Launcher(workers_per_host=1, backend=None).session() as session:
        (host,) = session.run(os.getpid).hostnames
        assert repr(session) == f"<Session on {host}: idle>"
        run = session.submit(time.sleep, 1)
        assert repr(session) == f"<Session on {host}: 1 run under way>"
        run.wait()
    assert repr(session) == "<Session: closed>"


async def test_session_in_a_coroutine_blocks_no_event_loop(cluster: None, tmp_path: Path) -> None:
    """Neither while it waits for room, nor at its end, which waits for runs that were submitted."""

    def wait_for_gate() -> None:
        assert processes.wait_until((tmp_path / "gate").exists, 60)

    import ipykernel.kernelapp  # noqa: F401 - many libraries do; it makes no script a notebook

    async def work(launcher: trx.Launcher) -> "trx.Run[None]":
        async with launcher.session() as session:
            assert list(await session.submit(lambda: "well")) == ["well"]
            run = session.submit(wait_for_gate)
            is_ending.set()
            return run

    is_ending = asyncio.Event()
    large = trx.Launcher(workers_per_host=1, cpus_per_worker=8, backend=None)
    async with large.session() as first:
        working = asyncio.create_task(work(large))
        await asyncio.sleep(0.5)
        assert not working.done()
        assert "idle" in repr(first)
    await asyncio.wait_for(is_ending.wait(), 60)
    await asyncio.sleep(0.3)
    assert not working.done()
    (tmp_path / "gate").touch()
    run = await asyncio.wait_for(working, 60)
    assert run.done()


async def test_session_that_finds_no_room_in_a_coroutine_says_so(cluster: None) -> None:
    launcher = trx.Launcher(hostnames=["nowhere"])
    with pytest.raises(trx.PlacementError):
        async with launcher.session():
            pass
    session = launcher.session()
    with pytest.raises(trx.PlacementError):
        await session.submit(os.getpid)
    session.close()


def test_session_that_is_closed_while_it_opens_holds_no_room(one: trx.Launcher) -> None:
    """That its room is free again is checked after every test, by its `cluster`."""

    async def close_while_it_opens() -> None:
        hosts = Hosts(one)
        opening = asyncio.create_task(hosts.open(Progress("closed-early")))
        await asyncio.sleep(0)
        await hosts.close()
        await opening
        with pytest.raises(RuntimeError, match="the session is closed"):
            await hosts.open(Progress("closed-already"))

    loop.start(close_while_it_opens()).result(60)


def test_session_that_is_interrupted_while_it_waits_has_given_its_room_back(
    one: trx.Launcher,
) -> None:
    """Else nobody would wait for that where the script ends by the interruption."""

    def states() -> list[str]:
        groups: dict[str, Any] = placement_group_table()
        return [each["state"] for each in groups.values() if "interrupted" in each["name"]]

    def interrupt_once_it_waits() -> None:
        processes.wait_until(lambda: states() == ["PENDING"])
        signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    cpus = ray.cluster_resources()["CPU"]
    try:
        with dataclasses.replace(one, cpus_per_worker=cpus).session():
            interrupting = threading.Thread(target=interrupt_once_it_waits)
            interrupting.start()
            with pytest.raises(KeyboardInterrupt):
                dataclasses.replace(one, name="interrupted").session()
            assert states() == ["REMOVED"]
            interrupting.join()
    finally:
        signal.signal(signal.SIGALRM, before)


async def test_cancelling_a_coroutine_ends_its_session(cluster: None) -> None:
    async def work() -> None:
        async with trx.Launcher(workers_per_host=1, backend=None).session() as session:
            runs.append(session.submit(time.sleep, 1000))
            await asyncio.sleep(1000)

    runs: list[trx.Run[None]] = []
    working = asyncio.create_task(work())
    while not runs:
        await asyncio.sleep(0.01)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert runs[0].cancelled()
