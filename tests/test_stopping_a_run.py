"""`cancel` lets workers save their work, however often it is called; `kill` does not."""

import asyncio
import concurrent.futures
import contextlib
import copy
import dataclasses
import os
import pickle
import signal
import sys
import time
import types
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group_table

import torchrunx_ray as trx
from tests.interrupts import result_with_one_ctrl_c
from tests.processes import above, is_alive, note, wait_until
from torchrunx_ray.driver.run import Run, _living
from torchrunx_ray.driver.running import stopping


@pytest.fixture
def patient(cluster: None) -> trx.Launcher:
    """Which gives workers so much time that no test waits for its end."""
    return trx.Launcher(workers_per_host=2, backend=None, shutdown_timeout=100)


def save_when_stopped(folder: Path) -> None:
    def save(*_: object) -> None:
        (folder / f"saving {os.environ['RANK']}").touch()
        wait_until(lambda: (folder / "go on").exists(), 20)
        (folder / f"saved {os.environ['RANK']}").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, save)
    note(folder / f"ready {os.environ['RANK']}", os.getpid())
    time.sleep(1000)


def ignore_sigterm(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"ready {os.getpid()}").touch()
    time.sleep(1000)


def both(folder: Path, what: str) -> bool:
    return wait_until(lambda: len(list(folder.glob(f"{what} *"))) == 2, 20)


def test_cancelling_again_leaves_workers_to_save_their_work(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    """`finally: run.cancel()` killed them in the middle of the checkpoint."""
    run = patient.submit(save_when_stopped, tmp_path)
    assert both(tmp_path, "ready")
    assert run.cancel()
    assert both(tmp_path, "saving")
    assert run.cancel()
    with pytest.raises(KeyboardInterrupt):
        result_with_one_ctrl_c(
            run, (tmp_path / "go on").touch
        )  # after a `cancel` it is the first one
    assert both(tmp_path, "saved")
    assert run.cancelled()


async def test_cancelling_who_awaits_twice_leaves_workers_to_save_their_work(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    async def wait_for(run: trx.Run[None]) -> None:
        await run

    run = patient.submit(save_when_stopped, tmp_path)
    assert await asyncio.to_thread(both, tmp_path, "ready")
    waiting = asyncio.create_task(wait_for(run))
    await asyncio.sleep(0)
    waiting.cancel()
    assert await asyncio.to_thread(both, tmp_path, "saving")
    waiting.cancel()
    await asyncio.sleep(0.1)
    (tmp_path / "go on").touch()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert both(tmp_path, "saved")


def test_session_that_an_exception_ends_leaves_cancelled_workers_to_save_their_work(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    with contextlib.suppress(KeyError), patient.session() as session:
        run = session.submit(save_when_stopped, tmp_path)
        assert both(tmp_path, "ready")
        run.cancel()
        assert both(tmp_path, "saving")
        (tmp_path / "go on").touch()
        raise KeyError
    assert run.cancelled()
    assert both(tmp_path, "saved")


@pytest.mark.parametrize("before", [[], ["cancel", "wait"], ["kill"]])
def test_kill_ends_workers_that_ignore_sigterm(
    patient: trx.Launcher, before: list[str], tmp_path: Path
) -> None:
    run = patient.submit(ignore_sigterm, tmp_path)
    assert both(tmp_path, "ready")
    for each in before:
        time.sleep(0.5) if each == "wait" else getattr(run, each)()
    assert run.kill()
    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=60)
    assert not any(is_alive(int(path.name.split()[1])) for path in tmp_path.iterdir())
    assert run.kill() is False


@pytest.mark.parametrize("grace_s", [1000, 1.5])
def test_kill_does_not_wait_for_an_agent_that_froze_after_the_cancel(
    patient: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    """Also where the agent should have killed by itself already."""
    monkeypatch.setattr(stopping, "_LAST_WORDS_S", 100.0)
    launcher = dataclasses.replace(patient, linger=0, shutdown_timeout=grace_s)
    run = launcher.submit(save_when_stopped, tmp_path)
    assert both(tmp_path, "ready")
    worker = next(int(path.read_text()) for path in tmp_path.glob("ready *"))
    run.cancel()
    assert both(tmp_path, "saving")
    time.sleep(0.5)  # for the agent's answer
    os.kill(agent := above(worker)["agent"], signal.SIGSTOP)
    if grace_s < 10:
        time.sleep(grace_s)
    run.kill()
    try:
        assert wait_until(run.done, 30)
    finally:
        gone = wait_until(lambda: not is_alive(agent), 20)
        if not gone:
            os.kill(agent, signal.SIGCONT)
    assert gone, "Ray has not killed the frozen agent"


def test_run_that_waits_for_room_can_be_killed(patient: trx.Launcher) -> None:
    with patient.session():
        run = dataclasses.replace(patient, workers_per_host=8).submit(os.getpid)
        assert wait_until(
            lambda: "PENDING" in {group["state"] for group in placement_group_table().values()}
        )
        run.kill()
        with pytest.raises(concurrent.futures.CancelledError):
            run.result(timeout=60)


@pytest.mark.parametrize(
    ("timeout", "error"), [("3", TypeError), (float("nan"), ValueError), ([], TypeError)]
)
def test_wrong_timeout_is_refused_and_stops_nothing(
    patient: trx.Launcher, timeout: float, error: type[Exception], tmp_path: Path
) -> None:
    """It was taken for an interruption."""

    def wait_for_gate() -> None:
        wait_until((tmp_path / "gate").exists, 20)

    run = patient.submit(wait_for_gate)
    for ask in (run.result, run.exception):
        with pytest.raises(error, match=r"^timeout="):
            ask(timeout=timeout)
    (tmp_path / "gate").touch()
    assert list(run.result(timeout=60)) == [None, None]


def test_exception_of_the_wait_itself_stops_nothing(
    patient: trx.Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what comes from outside does: Ctrl-C, sys.exit, and a signal handler's exception."""

    def wait_for_gate() -> None:
        wait_until((tmp_path / "gate").exists, 20)

    run = patient.submit(wait_for_gate)
    with monkeypatch.context() as patched:
        patched.setattr("torchrunx_ray.driver.background.loop._STEP_S", "no number")
        with pytest.raises(TypeError):
            run.result()
    (tmp_path / "gate").touch()
    assert list(run.result(timeout=60)) == [None, None]


@pytest.mark.parametrize("at", ["call_soon_threadsafe", "_write_to_self"])
def test_ctrl_c_inside_submit_leaves_no_run_that_nobody_holds(
    patient: trx.Launcher, at: str, tmp_path: Path
) -> None:
    """Before the run was handed to the loop, or just after: the script's end waited for it for ever."""

    def interrupt(frame: types.FrameType, event: str, _: object) -> None:
        caller = (
            frame.f_back if at == "call_soon_threadsafe" else frame.f_back and frame.f_back.f_back
        )
        if frame.f_code.co_name == at and caller and caller.f_code is Run.__init__.__code__:
            sys.settrace(None)
            raise KeyboardInterrupt

    def work() -> None:
        (tmp_path / "begun").touch()
        time.sleep(1000)

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            patient.submit(work)
    finally:
        sys.settrace(before)
    assert wait_until(lambda: _living == {})


def test_run_can_be_neither_copied_nor_pickled(
    patient: trx.Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    run = patient.submit(os.getpid)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=rf"{run.name} cannot be copied or pickled: .*result"):
            copied(run)
    run.wait()
    del run
    assert "Exception ignored" not in capfd.readouterr().err


def test_cancelled_run_gives_up_an_agent_that_has_frozen(
    patient: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LAST_WORDS_S", 2.0)
    run = dataclasses.replace(patient, shutdown_timeout=0.5, linger=0).submit(
        save_when_stopped, tmp_path
    )
    assert both(tmp_path, "ready")
    workers = [int(path.read_text()) for path in tmp_path.glob("ready *")]
    os.kill(agent := above(workers[0])["agent"], signal.SIGSTOP)
    run.cancel()
    try:
        with pytest.raises(concurrent.futures.CancelledError):
            run.result(timeout=60)
    finally:
        gone = wait_until(lambda: not is_alive(agent), 20)
        if not gone:
            os.kill(agent, signal.SIGCONT)
    assert gone, "the agent that was given up is not killed"
    assert wait_until(lambda: not any(map(is_alive, workers)), 20)
