"""A run in the background, and sessions."""

import asyncio
import concurrent.futures
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

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


def test_cancel_while_the_template_imports(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        f"import time; open({str(tmp_path / 'imports')!r}, 'w').close(); time.sleep(1000)"
    )
    launcher = trx.Launcher(
        workers_per_host=1,
        linger=0,
        preload=("slow_to_import",),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
    )
    run = launcher.submit(os.getpid)
    assert wait_until((tmp_path / "imports").exists, 30)
    run.cancel()

    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=30)


def test_early_cancels_leave_no_placement_group(cluster: None) -> None:
    """A cancellation while Ray made the group orphaned it; one while Ray placed it, its CPUs.

    That those are free again is checked after every test, by its `cluster`.
    """

    def living() -> set[str]:
        table = ray.util.placement_group_table()
        return {i for i, group in table.items() if group["state"] != "REMOVED"}

    before = living()
    for i in range(60):
        run = trx.Launcher(workers_per_host=1, linger=0).submit(os.getpid)
        time.sleep(i * 0.0003)
        run.cancel()
        try:
            run.result(timeout=30)
        except concurrent.futures.CancelledError:
            pass

    assert wait_until(lambda: living() <= before)


def test_many_kills_leave_no_worker(launcher: trx.Launcher, tmp_path: Path) -> None:
    """The third of them gave up on workers that ignore SIGTERM; the next launch met them."""

    def ignore_sigterm() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / str(os.getpid())).touch()
        time.sleep(1000)

    run = launcher.submit(ignore_sigterm)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    for stop in (run.cancel, *[run.kill] * 4):
        stop()
        time.sleep(0.001)
    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=30)

    assert not any(is_alive(int(path.name)) for path in tmp_path.iterdir())
    assert list(launcher.run(lambda: "well")) == ["well", "well"]


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


async def test_cancelling_whoever_awaits_a_run_stops_it(launcher: trx.Launcher) -> None:
    """It went on, and held its hosts, with nobody to tell it to stop."""
    run = launcher.submit(time.sleep, 1000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run, 1)
    assert run.done()
    with pytest.raises(asyncio.CancelledError):
        await run


@pytest.mark.slow
def test_runs_in_threads_do_not_disturb_each_other(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=1, backend=None, preload=())

    def launch(number: int) -> int:
        return launcher.run(lambda: number).rank(0)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(launch, range(6))) == list(range(6))


@pytest.mark.slow  # Ray takes 15 s to shut down where another thread than the main one began it
def test_first_launches_in_threads_share_one_ray(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """All but one raised "Perhaps you called ray.init twice by accident?"."""
    done = run_script(
        """
ray.shutdown()
import os, concurrent.futures, torchrunx_ray as trx
os.environ["RAY_ADDRESS"] = "local"
launcher = trx.Launcher(workers_per_host=1, cpus_per_worker=0.1, backend=None, preload=())
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(sorted(pool.map(lambda i: launcher.run(lambda: i).rank(0), range(4))))
"""
    )

    assert done.stdout.endswith("[0, 1, 2, 3]\n"), done.stderr


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


@pytest.mark.slow
def test_run_that_the_scripts_end_stops_is_told(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import atexit, threading, time, torchrunx_ray as trx

def start(_):
    raise RuntimeError("can't create new thread at interpreter shutdown")

launcher = trx.Launcher(workers_per_host=1, backend=None, name="left")
run, other = (launcher.submit(time.sleep, 100) for _ in range(2))

def wait_for_the_other(_):
    other.wait()
    print("both have ended")

run.add_done_callback(wait_for_the_other)
atexit.register(setattr, threading.Thread, "start", start)  # as from Python 3.12 on
while "running" not in repr(run) or "running" not in repr(other):
    time.sleep(0.01)
"""
    )
    assert (done.returncode, done.stdout) == (0, "both have ended\n"), done.stderr
    assert "the script ended while <Run left-" in done.stderr
    assert ": running 1 worker>; the run is being stopped, " in done.stderr


def test_run_says_who_it_is_and_how_it_ended(launcher: trx.Launcher) -> None:
    def fail() -> None:
        raise KeyError

    ended, failed = launcher.submit(os.getpid), launcher.submit(fail)
    cancelled = launcher.submit(time.sleep, 1000)
    cancelled.cancel()
    for run in (ended, failed, cancelled):
        run.wait()
    with pytest.raises(KeyError):
        failed.result()

    assert re.fullmatch(r"<Run getpid-\w+: ended>", repr(ended))
    assert re.fullmatch(r"<Run fail-\w+: failed>", repr(failed))
    assert re.fullmatch(r"<Run sleep-\w+: cancelled>", repr(cancelled))
