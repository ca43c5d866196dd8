"""What workers say reaches its places, whatever becomes of the thread that brings it there."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.logs import HEAD, Kept
from tests.processes import note, wait_until
from torchrunx_ray.driver.agents.agent_link import AgentLink
from torchrunx_ray.driver.cluster.connection import ClusterLeft
from torchrunx_ray.driver.output import run_logs
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.output.speaker import Speaker
from torchrunx_ray.driver.output.to_files import ToFiles
from torchrunx_ray.driver.running import stopping
from torchrunx_ray.wire.messages import AttemptId


async def test_record_that_cannot_be_read_ends_neither_the_output_nor_the_run(kept: Kept) -> None:
    """json.loads raises RecursionError. The thread ended, and the run waited for it for ever."""
    who = Speaker("vm", 0, 0, is_first_host=True)
    logs = RunLogs("run", trx.Launcher(log_handlers=[kept]), [kept], None, [who])
    logs.put(who, "records", b"[" * 200_000 + b"\n", time.time())
    logs.put(who, "stdout", b"after it\n", time.time())
    await logs.drain()

    assert "after it" in [text for _, text in kept.said]


async def test_line_without_an_end_is_written_at_the_end_of_the_run(kept: Kept) -> None:
    """A template that prints half a line lives on, and does not end the line."""
    who = Speaker("vm", None, None, is_first_host=True)
    logs = RunLogs("run", trx.Launcher(log_handlers=[kept]), [kept], None, [who])
    logs.put(who, "stdout", b"loading...", time.time())
    await logs.drain()

    assert kept.said == [("INFO", "loading...")]


async def test_line_without_an_end_is_written_before_another_attempt_begins(tmp_path: Path) -> None:
    """The host was lost in the middle of a line, and then has another rank in the same file."""
    files = ToFiles(str(tmp_path))
    before, after = (Speaker("vm", 0, rank, is_first_host=rank == 0) for rank in (1, 0))
    logs = RunLogs("run", trx.Launcher(console_ranks=()), "auto", files, [before])
    logs.begin_attempt(AttemptId("run", 0))
    logs.put(before, "stdout", b"half a li", time.time())
    logs.expect([after])
    logs.begin_attempt(AttemptId("run", 1))
    logs.put(after, "stdout", b"well\n", time.time())
    await logs.drain()

    assert files.directory is not None
    lines = HEAD.sub("", (files.directory / "vm[0].log").read_text()).splitlines()
    assert lines == ["half a li", "attempt 1 begins as rank 0", "well"]


async def test_lines_say_whose_they_are_once_another_attempt_has_more_ranks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_logs, "driver_has_configured_logging", lambda: False)
    first, second = (Speaker("vm", i, i, is_first_host=True) for i in range(2))
    logs = RunLogs("run", trx.Launcher(console_ranks="all"), "auto", None, [first])
    logs.put(first, "stdout", b"alone\n", time.time())
    while logs.is_at_work:
        await asyncio.sleep(0.01)
    logs.expect([first, second])
    logs.put(second, "stdout", b"together\n", time.time())
    await logs.drain()

    assert capfd.readouterr().out == "alone\n[vm:1] together\n"


def test_run_that_cannot_begin_leaves_no_thread(
    one: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when ray.shutdown() comes just then."""

    async def leave(*_: object) -> None:
        raise ClusterLeft(through_client=False)

    monkeypatch.setattr(AgentLink, "_start", leave)
    with pytest.raises(trx.LaunchError, match="left the Ray cluster"):
        one.run(os.getpid)
    assert wait_until(lambda: "torchrunx_ray output" not in names_of_threads())


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


async def test_output_that_no_thread_can_write_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the terminal is stopped, and no second thread can be started for the files."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    stopped = Stopped()
    logging.getLogger().addHandler(stopped)
    try:
        who = Speaker("vm", 0, 0, is_first_host=True)
        files = ToFiles(tmp_path, "run")
        logs = RunLogs("run", trx.Launcher(console_ranks="all"), "auto", files, [who])
        logs.put(who, "stdout", b"a line\n", time.time())
        await asyncio.to_thread(stopped.has_one.wait, 20)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            logs.hurry(0.1)
            await asyncio.wait_for(logs.drain(), 20)
    finally:
        stopped.goes_on.set()
        logging.getLogger().removeHandler(stopped)


class Stopped(logging.Handler):
    """As a terminal that takes nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.has_one, self.goes_on = threading.Event(), threading.Event()

    def createLock(self) -> None:  # noqa: N802
        """It would stop this thread, which logs here, too."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("torchrunx_ray."):
            self.has_one.set()
            self.goes_on.wait()


@pytest.mark.slow
def test_stopped_terminal_costs_the_log_files_of_a_cancelled_run_nothing(
    one: trx.Launcher,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only thread that wrote hung in the terminal, and what was queued was dropped."""

    def speak_until_stopped() -> None:
        def say_last_words(*_: object) -> None:
            print("the last words", flush=True)
            os._exit(0)

        signal.signal(signal.SIGTERM, say_last_words)
        for i in range(1000):
            logging.getLogger().warning("record %d", i)
            print("line", i, flush=True)
        note(tmp_path / "spoken", "")
        time.sleep(1000)

    monkeypatch.setattr(stopping, "_LAST_LINES_S", 1.0)
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path))
    stopped = Stopped()
    logging.getLogger().addHandler(stopped)
    try:
        run = dataclasses.replace(one, log_handlers="auto").submit(speak_until_stopped)
        assert wait_until((tmp_path / "spoken").exists, 60)
        run.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            run.result(timeout=60)
    finally:
        stopped.goes_on.set()
        logging.getLogger().removeHandler(stopped)
    (path,) = tmp_path.glob("2*/*[[]0].log")
    written = path.read_text()
    assert written.endswith("the last words\n")
    assert [written.count(f"record {i}\n") for i in range(1000)] == [1] * 1000
    assert [written.count(f"line {i}\n") for i in range(1000)] == [1] * 1000
    assert "it is still written to the log files" in caplog.text
    assert "do not have all" not in caplog.text
