"""A handler that takes its time stops the workers: nothing is lost, unless somebody gives it up."""

import concurrent.futures
import dataclasses
import itertools
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.interrupts import result_with_one_ctrl_c
from tests.logs import Kept
from tests.processes import above, note, wait_until
from torchrunx_ray.driver.output import run_logs
from torchrunx_ray.driver.running import stopping, supervisor


@pytest.mark.slow
def test_slow_handler_stops_workers_and_loses_nothing(cluster: None) -> None:
    class Slow(Kept):
        def emit(self, record: logging.LogRecord) -> None:
            if not self.records:
                time.sleep(5)
            super().emit(record)

    def flood() -> float:
        begun = time.monotonic()
        for i in range(400_000):
            print(f"{i:100}")
        return time.monotonic() - begun

    slow = Slow()
    launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=[slow])
    took_s = launcher.run(flood).rank(0)

    assert [int(text) for _, text in slow.said] == list(range(400_000))
    assert took_s > 4  # nobody kept 40 MB for it


@pytest.mark.slow
def test_failure_is_heard_while_a_handler_blocks(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LAST_WORDS_S", 4.0)

    class Blocked(Kept):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            ended.wait()

    def flood_and_wait() -> None:
        if os.environ["RANK"] == "0":
            for i in itertools.count():
                print(i, "x" * 10_000)
        time.sleep(2)
        raise ValueError("found out")

    ended = threading.Event()
    blocked = Blocked()
    launcher = trx.Launcher(
        workers_per_host=2, backend=None, log_handlers=[blocked], shutdown_timeout=1
    )
    run = launcher.submit(flood_and_wait)
    try:
        assert wait_until(lambda: "stopping" in repr(run), 30)
        assert wait_until(lambda: not run.stacks(), 15)
        # Its workers are gone, and the launch waits for its output to be taken, however long.
        time.sleep(6)
        assert not run.done()
    finally:
        ended.set()
    with pytest.raises(ValueError, match="found out") as caught:
        run.result(timeout=60)
    assert len(caught.value.__cause__.failures) == 1  # the agent was not taken for a frozen one
    counts = [int(record.getMessage().split()[0]) for record in blocked.records]
    assert counts == list(range(counts[-1] + 1))


@pytest.fixture
def blocked() -> Iterator[Kept]:
    """A handler that takes one record, and no other until the test ends."""

    class Blocked(Kept):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            ended.wait()

    ended = threading.Event()
    yield Blocked()
    ended.set()


def test_kill_gives_up_output_that_nobody_takes(
    one: trx.Launcher,
    blocked: Kept,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "_LAST_LINES_S", 1000.0)
    run = dataclasses.replace(one, log_handlers=[blocked]).submit(flood)
    assert wait_until(lambda: bool(blocked.records), 30)
    run.cancel()
    time.sleep(1)  # a person's finger
    assert not run.done()
    run.kill()
    assert wait_until(run.done)
    assert "is not shown" in caplog.text


def test_cancelled_run_waits_some_seconds_for_a_handler_that_blocks(
    one: trx.Launcher,
    blocked: Kept,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "_LAST_LINES_S", 0.5)
    run = dataclasses.replace(one, log_handlers=[blocked]).submit(flood)
    assert wait_until(lambda: bool(blocked.records), 30)
    run.cancel()
    assert wait_until(run.done)
    assert "is not shown" in caplog.text


def test_cancelled_run_whose_agent_freezes_before_its_last_output_ends(
    one: trx.Launcher, blocked: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def announce_and_flood() -> None:
        note(tmp_path / "pid", str(os.getpid()))
        flood()

    monkeypatch.setattr(stopping, "_LAST_LINES_S", 4.0)
    monkeypatch.setattr(stopping, "_LAST_WORDS_S", 100.0)
    monkeypatch.setattr(run_logs, "_MOST_BYTES", 100_000)
    run = dataclasses.replace(one, log_handlers=[blocked], linger=0).submit(announce_and_flood)
    assert wait_until(lambda: bool(blocked.records), 30)
    agent = above(int((tmp_path / "pid").read_text()))["agent"]
    time.sleep(0.5)  # until the driver takes no more output
    run.cancel()
    assert wait_until(lambda: not run.stacks(), 15)
    time.sleep(1)  # until the driver has heard that the workers are gone
    os.kill(agent, signal.SIGSTOP)
    try:
        assert wait_until(run.done, 30)
    finally:
        os.kill(agent, signal.SIGCONT)


def test_slow_terminal_costs_the_log_files_of_a_cancelled_run_nothing(
    one: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            time.sleep(0.1 if record.name.startswith("torchrunx_ray.") else 0)

    def speak_until_stopped() -> None:
        def say_last_words(*_: object) -> None:
            print("the last words", flush=True)
            os._exit(0)

        signal.signal(signal.SIGTERM, say_last_words)
        for i in itertools.count():
            print(i, flush=True)
            time.sleep(0.005)

    def written() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("2*/*[[]0].log"))

    monkeypatch.setattr(stopping, "_LAST_LINES_S", 2.0)
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path))
    slow = Slow()
    logging.getLogger().addHandler(slow)
    try:
        run = dataclasses.replace(one, log_handlers="auto").submit(speak_until_stopped)
        assert wait_until(lambda: "20\n" in written(), 60)
        run.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            run.result(timeout=60)
    finally:
        logging.getLogger().removeHandler(slow)
    assert written().endswith("the last words\n")


def test_killed_run_has_its_end_in_the_log_files(
    one: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path))
    run = dataclasses.replace(one, log_handlers="auto", console_ranks=[]).submit(flood)
    assert wait_until(lambda: bool(list(tmp_path.glob("2*/*[[]0].log"))), 60)
    run.kill()
    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=60)
    (story,) = tmp_path.glob("2*/*[!]].log")
    assert "stopping the workers that still run: SIGKILL" in story.read_text()
    assert "the run has ended on this host" in story.read_text()


def test_failure_is_told_while_output_is_waited_for_and_again_with_ctrl_c(
    one: trx.Launcher,
    blocked: Kept,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def say_and_fail() -> None:
        print("before")
        raise ValueError("found out")

    monkeypatch.setattr(stopping, "_LAST_LINES_S", 0.5)
    monkeypatch.setattr(supervisor, "_TELL_AFTER_S", 0.3)
    run = dataclasses.replace(one, log_handlers=[blocked]).submit(say_and_fail)
    told = "does not accept the output of the workers: rank 0 on .*ValueError: found out"
    assert wait_until(lambda: re.search(told, caplog.text) is not None, 30)
    with pytest.raises(KeyboardInterrupt) as caught:
        result_with_one_ctrl_c(run)
    assert any("ValueError: found out" in note for note in caught.value.__notes__)


def flood() -> None:
    while True:
        print("x" * 10_000)


@pytest.mark.slow
def test_drivers_handler_that_blocks_stops_no_run_and_loses_no_line(launcher: trx.Launcher) -> None:
    """As on a terminal that was stopped by Ctrl-S, where Ctrl-C did nothing either."""

    class Blocked(Kept):
        def emit(self, record: logging.LogRecord) -> None:
            is_reached.set()
            ended.wait()
            super().emit(record)

    def names_rank(rank: int) -> trx.Run[int]:
        return dataclasses.replace(launcher, console_ranks=[rank]).submit(len, "four")

    def named() -> list[str]:
        return [text[15] for _, text in blocked.said if text.startswith("console_ranks=[")]

    is_reached, ended, blocked = threading.Event(), threading.Event(), Blocked()
    ours = logging.getLogger("torchrunx_ray")
    ours.addHandler(blocked)
    try:
        sleeping = launcher.submit(time.sleep, 1000)
        assert [list(names_rank(rank).result(timeout=30)) for rank in (7, 8, 9)] == [[4, 4]] * 3
        assert wait_until(lambda: "running" in repr(sleeping), 30)
        sleeping.cancel()
        assert wait_until(sleeping.done, 30)
        assert is_reached.is_set()
        assert named() == []
        ended.set()
        assert wait_until(lambda: named() == ["7", "8", "9"], 30)
        names_rank(6).result()
        assert named() == ["7", "8", "9", "6"]  # the last one is there when its run has ended
    finally:
        ended.set()
        ours.removeHandler(blocked)
