"""A run in the background, and sessions."""

import asyncio
import concurrent.futures
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.processes import is_alive, wait_until


def test_submit_does_not_wait(launcher: trx.Launcher, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def wait_for_gate() -> str:
        while not gate.exists():
            time.sleep(0.01)
        return "through"

    run = launcher.submit(wait_for_gate)
    with pytest.raises(TimeoutError):
        run.result(timeout=0.2)
    assert not run.done()
    gate.touch()

    assert list(run.result(timeout=30)) == ["through", "through"]
    assert run.done()
    assert run.cancel() is False


def test_cancelled_run_leaves_no_worker(launcher: trx.Launcher, tmp_path: Path) -> None:
    def announce_and_sleep() -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(1000)

    run = launcher.submit(announce_and_sleep)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    begun = time.monotonic()
    assert run.cancel()

    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=10)
    assert run.done()
    assert time.monotonic() - begun < 1
    assert not any(is_alive(int(path.name)) for path in tmp_path.iterdir())


def test_cancel_while_the_template_imports(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=1, linger=0, preload=("torch", "torch._dynamo"))
    run = launcher.submit(os.getpid)
    run.cancel()

    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=10)


async def test_run_can_be_awaited(launcher: trx.Launcher) -> None:
    result, other = await asyncio.gather(
        launcher.submit(lambda: "one"),
        trx.Launcher(workers_per_host=1).submit(lambda: "other"),
    )

    assert list(result) == ["one", "one"]
    assert list(other) == ["other"]


async def test_awaited_run_raises(launcher: trx.Launcher) -> None:
    with pytest.raises(ZeroDivisionError):
        await launcher.submit(lambda: 1 // 0)


def test_runs_in_threads_do_not_disturb_each_other(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=1)

    def launch(number: int) -> int:
        return launcher.run(lambda: number).rank(0)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(launch, range(6))) == list(range(6))


def test_session_keeps_its_placement_and_renews_its_workers(cluster: None) -> None:
    import ray

    with trx.Launcher(workers_per_host=2).session() as session:
        first = session.run(os.getpid)
        held = ray.available_resources().get("CPU", 0)
        second = session.run(os.getpid)

    assert len({*first, *second}) == 4
    assert held <= 6
    assert wait_until(lambda: ray.available_resources()["CPU"] == 8)


def test_session_survives_a_failed_run(cluster: None) -> None:
    with trx.Launcher(workers_per_host=2).session() as session:
        with pytest.raises(ZeroDivisionError):
            session.run(lambda: 1 // 0)
        assert list(session.run(lambda: "well")) == ["well", "well"]


def test_runs_of_a_session_wait_for_each_other(cluster: None, tmp_path: Path) -> None:
    def alone() -> bool:
        lock = tmp_path / "lock"
        lock.touch(exist_ok=False)
        time.sleep(0.1)
        lock.unlink()
        return True

    with trx.Launcher(workers_per_host=1).session() as session:
        runs = [session.submit(alone) for _ in range(3)]

    assert all(run.result(timeout=0).rank(0) for run in runs)


def test_session_that_is_closed_says_so(cluster: None) -> None:
    with trx.Launcher(workers_per_host=1).session() as session:
        session.run(os.getpid)

    with pytest.raises(RuntimeError, match="the session is closed"):
        session.run(os.getpid)


def test_exception_in_the_with_block_cancels_the_runs(cluster: None) -> None:
    try:
        with trx.Launcher(workers_per_host=1).session() as session:
            run = session.submit(time.sleep, 1000)
            raise KeyError
    except KeyError:
        pass

    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=0)


def test_failure_that_nobody_asks_for_is_told(
    launcher: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("unheard")

    with launcher.session() as session:
        session.submit(fail)
        asked = session.submit(fail)
        with pytest.raises(ValueError, match="unheard"):
            asked.result()
    del asked

    (said,) = [r.getMessage() for r in caplog.records if "nobody asked" in r.getMessage()]
    assert said.startswith("fail-")
    assert "ValueError: unheard" in said


def test_run_that_the_scripts_end_stops_is_told(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import time, torchrunx_ray as trx
run = trx.Launcher(workers_per_host=1, backend=None, name="left").submit(time.sleep, 100)
while "running" not in repr(run):
    time.sleep(0.01)
"""
    )
    assert done.returncode == 0
    assert "the script ended while <Run left-" in done.stderr
    assert ": running 1 worker>; it is stopped." in done.stderr


def test_run_says_who_it_is(launcher: trx.Launcher) -> None:
    run = launcher.submit(os.getpid)
    run.result()
    assert repr(run).startswith("<Run getpid-")
    assert repr(run).endswith(": ended>")
