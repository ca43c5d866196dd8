"""Ctrl-C while a run is waited for: what is said, what is shown, and what a second one does."""

import asyncio
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.processes import is_alive, wait_until
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.running import attempt
from torchrunx_ray.wire.messages import StacksWanted

HINT = "A second Ctrl-C kills them"


@pytest.fixture
def patient(cluster: None) -> trx.Launcher:
    """Which gives workers so much time that no test waits for its end."""
    return trx.Launcher(workers_per_host=1, backend=None, shutdown_timeout=100)


def ignore_sigterm(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"ready {os.getpid()}").touch()
    time.sleep(1000)


def save_when_stopped(folder: Path) -> None:
    def save(*_: object) -> None:
        (folder / "saving").touch()
        wait_until((folder / "go on").exists, 20)
        (folder / "saved").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, save)
    (folder / "ready").touch()
    time.sleep(1000)


def worker_lives(folder: Path) -> bool:
    return any(is_alive(int(path.name.split()[1])) for path in folder.glob("ready *"))


def press_ctrl_c_when(*moments: Callable[[], object]) -> None:
    """In the main thread, after each of these in turn."""

    def press() -> None:
        for moment in moments:
            if wait_until(lambda moment=moment: bool(moment()), 30):
                os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def ready(folder: Path) -> Callable[[], bool]:
    return lambda: any(folder.glob("ready*"))


def wait_for_session(launcher: trx.Launcher, folder: Path) -> None:
    with launcher.session() as session:
        session.submit(ignore_sigterm, folder)


def leave_session(launcher: trx.Launcher, folder: Path) -> None:
    with launcher.session() as session:
        session.submit(ignore_sigterm, folder)
        time.sleep(1000)


WAITS: dict[str, Callable[[trx.Launcher, Path], object]] = {
    "launcher.run": lambda launcher, folder: launcher.run(ignore_sigterm, folder),
    "close": wait_for_session,
    "with": leave_session,
}


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_says_that_a_second_one_kills_which_then_does(
    wait: str, patient: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    press_ctrl_c_when(ready(tmp_path), lambda: HINT in caplog.text)
    with pytest.raises(KeyboardInterrupt) as caught:
        WAITS[wait](patient, tmp_path)
    assert caplog.text.count(HINT) == 1
    assert not worker_lives(tmp_path)
    shown = "".join(traceback.format_exception(caught.value))
    assert "concurrent/futures" not in shown
    assert "threading.py" not in shown
    assert shown.count("torchrunx_ray/driver") <= 2, shown


def test_ctrl_c_shows_what_the_ranks_were_doing(
    patient: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "_STACKS_AT_CANCEL", StacksWanted(within_s=20, thread_s=20))
    (tmp_path / "go on").touch()
    press_ctrl_c_when(ready(tmp_path))
    with pytest.raises(KeyboardInterrupt) as caught:
        patient.run(save_when_stopped, tmp_path)
    (note, *_) = caught.value.__notes__
    assert note.startswith(
        "When the run was interrupted:\nrank 0: save_when_stopped (test_ctrl_c.py:"
    )


def test_second_ctrl_c_of_asyncio_run_kills(patient: trx.Launcher, tmp_path: Path) -> None:
    async def main() -> None:
        await run

    run = patient.submit(ignore_sigterm, tmp_path)
    press_ctrl_c_when(ready(tmp_path), lambda: "stopping" in repr(run))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert run.cancelled()
    assert not worker_lives(tmp_path)


def test_one_ctrl_c_of_asyncio_run_lets_workers_save_what_a_cancelled_task_awaits(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    """The task is cancelled in `finally`, and then by asyncio.run itself."""

    async def wait_for_run() -> None:
        await run

    async def main() -> None:
        task = asyncio.create_task(wait_for_run())
        try:
            await asyncio.sleep(1000)
        finally:
            task.cancel()
            await asyncio.to_thread(wait_until, (tmp_path / "saving").exists, 30)
            asyncio.get_running_loop().call_later(0.3, (tmp_path / "go on").touch)

    run = patient.submit(save_when_stopped, tmp_path)
    press_ctrl_c_when(ready(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert (tmp_path / "saved").exists()


def test_ctrl_c_at_any_moment_of_a_wait_is_raised_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that hit the methods of a future left its lock held; the thread of all runs waited for that."""
    monkeypatch.setattr(loop, "_STEP_S", 0.00002)
    waits = False

    def interrupt(*_: object) -> None:
        nonlocal waits
        if waits:
            waits = False
            raise KeyboardInterrupt

    async def end_when(gate: asyncio.Event) -> None:
        await gate.wait()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(1500):
            gate = asyncio.Event()
            future = loop.start(end_when(gate))
            signal.setitimer(signal.ITIMER_REAL, 0.0003 + i % 100 * 0.000005, 0.001)
            try:
                waits = True
                loop.wait(future)
                pytest.fail("the interruption was lost")
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
            loop.running().call_soon_threadsafe(gate.set)
            assert wait_until(future.done, 10)
    finally:
        waits = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
