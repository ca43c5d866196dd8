"""Handlers and loggers of the driver's own get what they ask for, and harm nothing where they fail."""

import contextvars
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.logs import HEAD, Kept
from tests.processes import wait_until


def test_debug_records_come_to_a_handler_that_takes_them(cluster: None) -> None:
    kept = Kept(logging.DEBUG)
    launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=[kept])
    other = Kept()
    launcher = dataclasses.replace(launcher, log_handlers=[kept, other])
    launcher.run(lambda: logging.getLogger("mine").debug("fine"))

    assert kept.said == [("DEBUG", "fine")]
    assert other.said == []  # it has no level of its own


def test_loggers_of_hosts_and_ranks_have_their_levels(
    cluster: None, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the driver has configured logging, as pytest has."""
    launcher = trx.Launcher(workers_per_host=2, backend=None, console_ranks="all")
    (hostname,) = launcher.run(os.getpid).hostnames
    of_host = logging.getLogger(f"torchrunx_ray.{hostname}")
    of_rank = logging.getLogger(f"torchrunx_ray.{hostname}.1")
    of_host.addHandler(kept)

    def speak() -> None:
        print("out", os.environ["RANK"])
        print("err", os.environ["RANK"], file=sys.stderr)
        logging.getLogger("mine").debug(f"fine {os.environ['RANK']}")

    try:
        launcher.run(speak)
        assert sorted(text for _, text in kept.said) == ["err 0", "err 1", "out 0", "out 1"]
        kept.records.clear()
        of_host.setLevel(logging.ERROR)
        of_rank.setLevel(logging.DEBUG)
        launcher.run(speak)
        assert sorted(text for _, text in kept.said) == ["err 0", "err 1", "fine 1", "out 1"]
    finally:
        of_host.setLevel(logging.NOTSET)
        of_rank.setLevel(logging.NOTSET)
        of_host.removeHandler(kept)


def test_records_carry_the_runs_name_which_is_in_their_text_while_another_run_is_alive(
    cluster: None, kept: Kept, tmp_path: Path
) -> None:
    """What the launch's own handlers get is told apart by the record only."""

    def speak() -> None:
        print("alone", flush=True)
        while not (tmp_path / "other").exists():
            time.sleep(0.01)
        print("beside", flush=True)
        logging.getLogger("mine").warning("grave\nand more")

    def end() -> None:
        print("in a handler")
        (tmp_path / "other").touch()
        while not (tmp_path / "over").exists():
            time.sleep(0.01)

    handler, ours = Kept(), logging.getLogger("torchrunx_ray")
    launcher = trx.Launcher(workers_per_host=1, backend=None)
    ours.addHandler(kept)
    try:
        first = launcher.submit(speak)
        assert wait_until(lambda: ("INFO", "alone") in kept.said, 60)
        other = dataclasses.replace(launcher, log_handlers=[handler]).submit(end)
        first.result()
        (tmp_path / "over").touch()
        other.result()
        last = launcher.submit(print, "alone again")
        last.result()
    finally:
        ours.removeHandler(kept)

    records = [record for record in kept.records if record.name != "torchrunx_ray"]
    assert sorted((record.run_name, record.getMessage()) for record in records) == sorted(
        [
            (first.name, "alone"),
            (first.name, f"[{first.name}] beside"),
            (first.name, f"[{first.name}] grave\nand more"),
            (last.name, "alone again"),
        ]
    )
    assert [(record.run_name, record.msg) for record in handler.records] == [
        (other.name, "in a handler")
    ]


def test_function_that_makes_handlers_is_called_where_the_launch_is() -> None:
    made_in: list[str] = []

    def make() -> Any:
        made_in.append(threading.current_thread().name)
        return Kept()

    with pytest.raises(TypeError, match=r"log_handlers=.*: expected"):
        trx.Launcher(log_handlers=make).run(os.getpid)
    assert made_in == [threading.current_thread().name]


def test_helpers_choose_by_place_and_by_rank(cluster: None, tmp_path: Path) -> None:
    (hostname,) = trx.Launcher(workers_per_host=1, backend=None).run(os.getpid).hostnames
    by_rank, by_place, of_errors = Kept(), Kept(), Kept(logging.ERROR)
    trx.add_filter_to_handler(by_rank, rank=1, log_level="ERROR")
    trx.add_filter_to_handler(of_errors, rank=0)
    trx.add_filter_to_handler(by_place, hostname, 0)

    def make() -> Iterator[logging.Handler]:
        yield by_rank
        yield by_place
        yield of_errors
        yield trx.file_handler(hostname, 1, tmp_path / "of 1")
        yield trx.stream_handler(rank=5)

    def speak() -> None:
        print("out", os.environ["RANK"])
        print("err", os.environ["RANK"], file=sys.stderr)

    launcher = trx.Launcher(workers_per_host=2, backend=None, log_handlers=lambda: list(make()))
    launcher.run(speak)

    assert by_rank.said == [("ERROR", "err 1")]
    assert of_errors.said == [("ERROR", "err 0")]
    assert sorted(by_place.said) == [("ERROR", "err 0"), ("INFO", "out 0")]
    lines = (tmp_path / "of 1").read_text().splitlines()
    assert sorted(HEAD.sub("", line) for line in lines) == ["err 1", "out 1"]


def test_helpers_refuse_what_names_nobody() -> None:
    with pytest.raises(ValueError, match="give rank, or hostname"):
        trx.add_filter_to_handler(Kept(), "host", rank=1)
    with pytest.raises(ValueError, match="local_rank=1 needs a hostname"):
        trx.stream_handler(local_rank=1)
    with pytest.raises(ValueError, match="file_path"):
        trx.file_handler("host", 0)


def test_handler_of_a_worker_that_is_not_there_is_told_of(
    cluster: None, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    others = [
        trx.add_filter_to_handler(Kept(), rank=1),
        trx.add_filter_to_handler(Kept(), rank=7),
        trx.add_filter_to_handler(Kept(), "node9", 0),
    ]
    trx.Launcher(workers_per_host=2, backend=None, log_handlers=[kept, *others]).run(int)

    (said,) = [r.getMessage() for r in caplog.records if "log_handlers" in r.getMessage()]
    assert said.startswith(
        "log_handlers: rank 7, node9[0] is not in this launch, which has ranks 0 to 1 on "
    )


def test_handler_that_raises_is_reported_once_and_breaks_nothing(
    cluster: None, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
            raise OSError("no more room")

    class Closed(logging.StreamHandler[Any]):
        """Reports by its own handleError."""

    with open(os.devnull, "w") as closed:
        pass
    launcher = trx.Launcher(
        workers_per_host=1, backend=None, log_handlers=[Broken(), Closed(closed), kept]
    )
    launcher.run(lambda: [print(i) for i in range(100)])

    assert [text for _, text in kept.said] == [str(i) for i in range(100)]
    said = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(said) == 2
    assert "OSError: no more room" in said[0]


def test_handler_that_exits_ends_neither_the_run_nor_the_output(cluster: None, kept: Kept) -> None:
    class Exits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            sys.exit(f"enough of {record.getMessage()}")

    launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=[Exits(), kept])
    run = launcher.submit(print, "hello")
    run.result(timeout=60)
    assert kept.said == [("INFO", "hello")]


def test_handler_that_fails_on_its_own_report_is_survived(cluster: None, kept: Kept) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
            raise ConnectionError

    broken = Broken()
    logging.getLogger("torchrunx_ray").addHandler(broken)
    try:
        for handlers in ([broken, kept], "auto"):
            launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=handlers)
            launcher.submit(print, "hello").result(timeout=60)
    finally:
        logging.getLogger("torchrunx_ray").removeHandler(broken)
    assert kept.said == [("INFO", "hello")]


@pytest.mark.slow
def test_handler_may_serve_two_runs_at_once(
    cluster: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(logging.StreamHandler[Any]):
        """Reports by its own handleError."""

    with open(os.devnull, "w") as closed:
        pass
    broken = Broken(closed)
    launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=[broken])

    def speak_until(gate: Path) -> None:
        while not gate.exists():
            print("hello")
            time.sleep(0.05)

    gates = [tmp_path / "first", tmp_path / "second"]
    runs = [launcher.submit(speak_until, gate) for gate in gates]
    assert wait_until(lambda: all("running" in repr(run) for run in runs), 60)
    for gate, run in zip(gates, runs, strict=True):
        gate.touch()
        run.result()

    assert "Logging error" not in capfd.readouterr().err
    assert sum("of log_handlers failed" in r.getMessage() for r in caplog.records) == 1
    assert "handleError" not in vars(broken)


def test_drivers_handler_that_raises_leaves_the_room_free(cluster: None) -> None:
    """The line of the placement was outside of what gives it back; `cluster` looks."""

    class Dead(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError(f"the widget is closed, {record.levelname}")

    ours = logging.getLogger("torchrunx_ray")
    dead, level = Dead(), ours.level
    ours.addHandler(dead)
    ours.setLevel(logging.INFO)
    try:
        launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=None)
        assert launcher.run(len, "four").rank(0) == 4
    finally:
        ours.removeHandler(dead)
        ours.setLevel(level)


def test_output_is_written_in_the_context_of_whoever_launched(cluster: None) -> None:
    """A notebook's kernel may know by that which cell a line belongs to."""
    cell: contextvars.ContextVar[int] = contextvars.ContextVar("cell")
    written: list[int] = []

    class Noting(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            written.append(cell.get(-1))

    launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=[Noting()])
    for number in (5, 6):
        cell.set(number)
        launcher.run(print, "one line")
    assert written == [5, 6]


def test_drivers_handler_that_exits_breaks_no_run(launcher: trx.Launcher) -> None:
    class Exiting(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            sys.exit("a warning is an error here")

    ours, exiting = logging.getLogger("torchrunx_ray"), Exiting(logging.WARNING)
    ours.addHandler(exiting)
    try:
        run = dataclasses.replace(launcher, console_ranks=[7]).run(os.getpid)
    finally:
        ours.removeHandler(exiting)
    assert len(run) == len(launcher.run(os.getpid)) == 2
