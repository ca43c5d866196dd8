"""A run that is being stopped: what its workers, and its driver, see of that."""

import concurrent.futures
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests import processes
from tests.soon import soon
from torchrunx_ray.driver.running import stopping
from torchrunx_ray.wire import messages


def test_sigterm_is_sent_once_when_a_rank_exits_in_its_handler(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    """A second one enters the handler of a rank that is saving its checkpoint again."""

    def save_at_sigterm() -> None:
        rank = int(os.environ["RANK"])

        def handle(_signum: int, _frame: object) -> None:
            (tmp_path / f"signal {rank} {time.monotonic_ns()}").touch()
            if rank == 0:
                sys.exit(3)
            time.sleep(1)
            (tmp_path / "saved").touch()
            os._exit(0)

        signal.signal(signal.SIGTERM, handle)
        (tmp_path / f"ready {rank}").touch()
        time.sleep(1000)

    run = launcher.submit(save_at_sigterm)
    assert processes.wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, 30)
    run.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=30)

    assert (tmp_path / "saved").exists()
    assert len(list(tmp_path.glob("signal 0*"))) == 1
    assert len(list(tmp_path.glob("signal 1*"))) == 1


def test_second_interruption_does_not_wait_for_a_frozen_agent(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LAST_WORDS_S", 100.0)

    def announce_and_sleep() -> None:
        processes.note(tmp_path / "pid", f"{os.getpid()} {processes.own_mark()}")
        time.sleep(1000)

    def interrupt(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    run = trx.Launcher(workers_per_host=1, linger=0).submit(announce_and_sleep)
    assert processes.wait_until((tmp_path / "pid").exists, 30)
    pid, mark = (tmp_path / "pid").read_text().split()
    agent = processes.above(int(pid))["agent"]
    os.kill(agent, signal.SIGSTOP)
    interrupts = [threading.Timer(s, os.kill, (os.getpid(), signal.SIGUSR1)) for s in (0.2, 1.0)]
    try:
        for timer in interrupts:
            timer.start()
        with soon(), pytest.raises(KeyboardInterrupt):
            run.result()
        assert run.done()
    finally:
        for timer in interrupts:
            timer.join()
        signal.signal(signal.SIGUSR1, before)
        gone = processes.wait_until(lambda: not processes.is_alive(agent), 10)
        if not gone:
            os.kill(agent, signal.SIGCONT)
    assert gone, "Ray has not killed the frozen agent"
    assert processes.wait_until(lambda: processes.of_pool(mark) == {})


def test_event_that_the_driver_cannot_handle_ends_the_run_at_once(
    cluster: None, tmp_path: Path
) -> None:
    """A run that waits for its other hosts hangs as long as these have something to do."""

    def say_what_no_worker_says() -> None:
        if os.environ["RANK"] == "0":
            frame = sys._getframe()
            while "channel" not in frame.f_locals:
                assert frame.f_back is not None
                frame = frame.f_back
            frame.f_locals["channel"].send(messages.Joined(99, 0))
        processes.note(tmp_path / os.environ["RANK"], os.getpid())
        time.sleep(1000)

    launcher = trx.Launcher(
        hostnames=2, placement_strategy="STRICT_PACK", workers_per_host=1, backend=None
    )
    with pytest.raises(trx.LaunchError, match="IndexError") as caught:
        launcher.submit(say_what_no_worker_says).result(timeout=60)

    assert "Joined" in str(caught.value)
    assert isinstance(caught.value.__cause__, IndexError)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert not any(map(processes.is_alive, pids))
    assert len(launcher.run(os.getpid)) == 2
