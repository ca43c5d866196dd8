"""What workers say reaches log files and handlers: all of it, in order, and with its level."""

import ctypes
import dataclasses
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.processes import wait_until
from torchrunx_ray.driver import attempt

HEAD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d:[A-Z]+: ")


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default files go."""
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path / "logs"))
    return tmp_path / "logs"


def run_dir(logs: Path) -> Path:
    (directory,) = logs.iterdir()
    return directory


def texts(path: Path, level: str) -> list[str]:
    """The lines of a file that have this level."""
    heads = [line.split(": ", 1) for line in path.read_text().splitlines() if HEAD.match(line)]
    return [text for head, text in heads if head.endswith(f":{level}")]


class Kept(logging.Handler):
    """Keeps the records that it is given."""

    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(record.levelname, record.getMessage()) for record in self.records]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def one(cluster: None, kept: Kept) -> trx.Launcher:
    """One worker without a process group, whose output is kept."""
    return trx.Launcher(workers_per_host=1, backend=None, log_handlers=[kept])


def test_every_line_of_every_rank_is_in_its_file(cluster: None, logs: Path) -> None:
    def flood() -> None:
        for i in range(50_000):
            print(f"line {i} of rank {os.environ['RANK']} {'x' * 70}")

    launcher = trx.Launcher(workers_per_host=4, backend=None, console_ranks=())
    (hostname,) = launcher.run(flood).hostnames

    for rank in range(4):
        path = run_dir(logs) / f"{hostname}[{rank}].log"
        assert texts(path, "INFO") == [f"line {i} of rank {rank} {'x' * 70}" for i in range(50_000)]


def test_files_are_named_after_time_and_worker(cluster: None, logs: Path) -> None:
    launcher = trx.Launcher(workers_per_host=2, backend=None)
    for _ in range(3):
        (hostname,) = launcher.run(print, "hello").hostnames

    directories = sorted(logs.iterdir())
    assert len(directories) == 3
    assert all(datetime.fromisoformat(directory.name) for directory in directories)
    for directory in directories:
        names = sorted(path.name for path in directory.iterdir())
        assert names == [f"{hostname}[0].log", f"{hostname}[1].log"]


def test_agents_file_has_what_imports_print(cluster: None, logs: Path, tmp_path: Path) -> None:
    (tmp_path / "says_at_import.py").write_text("print('imported')\n")
    launcher = trx.Launcher(
        workers_per_host=1,
        backend=None,
        preload=("says_at_import",),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    (hostname,) = launcher.run(os.getpid).hostnames

    assert texts(run_dir(logs) / f"{hostname}.log", "INFO") == ["imported"]


def test_empty_directory_means_no_files(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launcher = trx.Launcher(workers_per_host=1, backend=None)
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", "")
    launcher.run(print, "hello")
    assert list(tmp_path.iterdir()) == []

    monkeypatch.delenv("TORCHRUNX_LOG_DIR")
    launcher.run(print, "hello")
    assert [path.name for path in tmp_path.iterdir()] == ["torchrunx_logs"]


def test_level_of_the_files_is_the_environments(
    cluster: None, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak() -> None:
        print("to stdout")
        logging.getLogger("mine").debug("fine")
        logging.getLogger("mine").warning("grave")

    launcher = trx.Launcher(workers_per_host=1, backend=None)
    monkeypatch.setenv("TORCHRUNX_LOG_LEVEL", "warning")
    (hostname,) = launcher.run(speak).hostnames
    (path,) = run_dir(logs).iterdir()
    assert [HEAD.sub("", line) for line in path.read_text().splitlines()] == ["mine: grave"]

    path.unlink()
    path.parent.rmdir()
    monkeypatch.setenv("TORCHRUNX_LOG_LEVEL", "DEBUG")
    launcher.run(speak)
    (path,) = run_dir(logs).iterdir()
    assert texts(path, "DEBUG") == ["mine: fine"]
    assert texts(path, "INFO") == ["to stdout"]
    assert path.name == f"{hostname}[0].log"


def test_files_that_cannot_be_written_are_reported_once(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path / "a file" / "logs"))

    def speak() -> str:
        for _ in range(10):
            print("hello", flush=True)
            time.sleep(0.01)
        return "well"

    result = trx.Launcher(workers_per_host=2, backend=None).run(speak)

    assert list(result) == ["well", "well"]
    said = [record.getMessage() for record in caplog.records if "log files" in record.getMessage()]
    assert len(said) == 1
    assert "TORCHRUNX_LOG_DIR" in said[0]


def test_crash_in_the_middle_of_a_line_loses_nothing(one: trx.Launcher, kept: Kept) -> None:
    def crash() -> None:
        for i in range(10_000):
            print("line", i)
        os.write(1, b"in the middle of a li")
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(trx.WorkerFailedError):
        one.run(crash)

    out = [text for level, text in kept.said if level == "INFO"]
    assert out == [*(f"line {i}" for i in range(10_000)), "in the middle of a li"]


def test_c_code_and_children_are_heard(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        libc = ctypes.CDLL(None)
        libc.puts(b"from C")
        libc.fflush(None)
        subprocess.run(["sh", "-c", "echo from a child; echo and its stderr >&2"], check=True)
        print("no newline at the end", end="")

    one.run(speak)

    assert sorted(kept.said) == [
        ("ERROR", "and its stderr"),
        ("INFO", "from C"),
        ("INFO", "from a child"),
        ("INFO", "no newline at the end"),
    ]


def test_very_long_line_is_one_line(one: trx.Launcher, kept: Kept) -> None:
    one.run(lambda: print("x" * 10_000_000))

    assert [(level, len(text)) for level, text in kept.said] == [("INFO", 10_000_000)]


def test_bytes_that_are_not_utf8_are_escaped(one: trx.Launcher, kept: Kept) -> None:
    one.run(os.write, 1, "ä".encode() + b"\xff and on\n")

    assert kept.said == [("INFO", "ä\\xff and on")]


def test_progress_bar_is_not_a_line_for_every_redraw(one: trx.Launcher, kept: Kept) -> None:
    def draw() -> None:
        for percent in range(101):
            sys.stderr.write(f"\r{percent:3}%|{'█' * (percent // 10):10}|")
            sys.stderr.flush()
            time.sleep(0.005)
        sys.stderr.write("\n")

    one.run(draw)

    assert kept.said == [("ERROR", f"100%|{'█' * 10}|")]


def test_records_keep_level_logger_place_and_exception(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        logging.getLogger("mine.own").info("loss %.1f", 0.25)
        try:
            raise ValueError("bad")
        except ValueError:
            logging.exception("it went wrong")
        logging.addLevelName(33, "ODD")
        logging.log(33, "odd")

    begun = time.time()
    (hostname,) = one.run(speak).hostnames

    first, second, third = kept.records
    assert (first.levelno, first.getMessage(), first.worker_logger) == (20, "loss 0.2", "mine.own")
    assert (first.filename, first.funcName) == ("test_logs.py", "speak")
    assert begun <= first.created <= time.time()
    assert (first.hostname, first.local_rank, first.rank) == (hostname, 0, 0)
    assert first.name == f"torchrunx_ray.{hostname}.0"
    assert second.levelname == "ERROR"
    assert second.getMessage().startswith("it went wrong\nTraceback (most recent call last):\n")
    assert second.getMessage().endswith("ValueError: bad")
    assert (third.levelname, third.getMessage()) == ("ODD", "odd")


def configure_plainly() -> None:
    logging.basicConfig(level=logging.DEBUG, format="mine %(levelname)s %(message)s")


def configure_by_force() -> None:
    logging.basicConfig(level=logging.DEBUG, format="mine %(levelname)s %(message)s", force=True)


def configure_by_hand() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("mine %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)


def test_functions_own_handlers_get_what_they_would_in_a_script(
    cluster: None, tmp_path: Path
) -> None:
    """The level of what the driver takes kept warnings from them."""

    def speak() -> None:
        logging.getLogger().addHandler(logging.FileHandler(tmp_path / "own"))
        logging.warning("grave")

    trx.Launcher(workers_per_host=1, backend=None, log_handlers=None).run(speak)
    assert (tmp_path / "own").read_text() == "grave\n"


def test_handler_of_a_preloaded_module_does_not_say_it_twice(
    one: trx.Launcher, kept: Kept, tmp_path: Path
) -> None:
    (tmp_path / "configures_logging.py").write_text("import logging; logging.basicConfig()\n")
    launcher = dataclasses.replace(
        one,
        preload=("configures_logging",),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    launcher.run(lambda: logging.getLogger("mine").warning("once"))

    assert kept.said == [("WARNING", "WARNING:mine:once")]


def test_function_may_log_to_stdout(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
        print("first")
        logging.info("second")
        print("third")

    one.run(speak)
    assert kept.said == [("INFO", "first"), ("INFO", "second"), ("INFO", "third")]


@pytest.mark.parametrize("configure", [configure_plainly, configure_by_force, configure_by_hand])
def test_functions_own_configuration_holds_and_no_line_comes_twice(
    configure: Callable[[], None], one: trx.Launcher, kept: Kept
) -> None:
    def speak() -> None:
        configure()
        logging.getLogger("some").debug("fine")
        logging.warning("grave")

    one.run(speak)

    assert [text for _, text in kept.said] == ["mine DEBUG fine", "mine WARNING grave"]


def test_functions_own_file_is_written_and_records_come_too(
    one: trx.Launcher, kept: Kept, tmp_path: Path
) -> None:
    def speak() -> None:
        logging.basicConfig(filename=tmp_path / "own", level=logging.INFO)
        logging.info("to both")

    one.run(speak)

    assert (tmp_path / "own").read_text() == "INFO:root:to both\n"
    assert kept.said == [("INFO", "to both")]


def test_debug_records_come_to_a_handler_that_takes_them(cluster: None) -> None:
    kept = Kept(logging.DEBUG)
    launcher = trx.Launcher(workers_per_host=1, backend=None, log_handlers=[kept])
    other = Kept()
    launcher = dataclasses.replace(launcher, log_handlers=[kept, other])
    launcher.run(lambda: logging.getLogger("mine").debug("fine"))

    assert kept.said == [("DEBUG", "fine")]
    assert other.said == []  # it has no level of its own


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
    monkeypatch.setattr(attempt, "_LAST_WORDS_S", 4.0)

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


def test_second_cancellation_gives_up_output_that_nobody_takes(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Blocked(Kept):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            ended.wait()

    def flood() -> None:
        while True:
            print("x" * 10_000)

    ended = threading.Event()
    blocked = Blocked()
    run = trx.Launcher(workers_per_host=1, backend=None, log_handlers=[blocked]).submit(flood)
    try:
        assert wait_until(lambda: bool(blocked.records), 30)
        run.cancel()
        time.sleep(1)  # a person's finger
        assert not run.done()
        run.cancel()
        assert wait_until(run.done, 5)
        assert "is not shown" in caplog.text
    finally:
        ended.set()


def test_file_that_cannot_be_written_costs_no_other(
    cluster: None, logs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def speak() -> None:
        print("first", flush=True)
        time.sleep(0.5)
        if os.environ["RANK"] == "1":
            (directory,) = logs.iterdir()
            (path,) = directory.glob("*1].log")
            path.unlink()
            path.mkdir()
        time.sleep(0.5)
        print("second", flush=True)

    launcher = trx.Launcher(workers_per_host=2, backend=None, console_ranks=())
    (hostname,) = launcher.run(speak).hostnames

    assert texts(run_dir(logs) / f"{hostname}[0].log", "INFO") == ["first", "second"]
    assert "cannot be written, or not all" in caplog.text


def test_tee_of_the_functions_own_does_not_say_it_twice(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        class Tee:
            def __init__(self, stream: "Any") -> None:
                self.stream = stream

            def write(self, text: str) -> None:
                self.stream.write(text)

            def flush(self) -> None:
                self.stream.flush()

        sys.stderr = Tee(sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.info("once")

    one.run(speak)
    assert [text for _, text in kept.said] == ["once"]


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
    by_rank, by_place = Kept(), Kept()
    trx.add_filter_to_handler(by_rank, rank=1, log_level="ERROR")
    trx.add_filter_to_handler(by_place, hostname, 0)

    def make() -> Iterator[logging.Handler]:
        yield by_rank
        yield by_place
        yield trx.file_handler(hostname, 1, tmp_path / "of 1")
        yield trx.stream_handler(rank=5)

    def speak() -> None:
        print("out", os.environ["RANK"])
        print("err", os.environ["RANK"], file=sys.stderr)

    launcher = trx.Launcher(workers_per_host=2, backend=None, log_handlers=lambda: list(make()))
    launcher.run(speak)

    assert by_rank.said == [("ERROR", "err 1")]
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


def test_nobody_takes_it_where_handlers_are_none(
    cluster: None, logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trx.Launcher(workers_per_host=1, backend=None, log_handlers=None).run(print, "hello")

    assert capfd.readouterr().out == ""
    assert not logs.exists()


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


@pytest.mark.parametrize("configured", [False, True])
def test_no_line_comes_twice_to_a_driver(
    configured: bool, run_script: Callable[[str], "subprocess.CompletedProcess[str]"]
) -> None:
    """Ray forwards what its actors print, and the driver may have configured logging."""
    configure = "logging.basicConfig(format='%(name)s %(message)s')" if configured else ""
    done = run_script(
        f"""
import logging, os, sys
import torchrunx_ray as trx
{configure}
def speak():
    print("to stdout")
    print("to stderr", file=sys.stderr)
    logging.getLogger("mine").warning("a record")

trx.launch(speak, workers_per_host=1, backend=None)
"""
    )
    assert done.returncode == 0, done.stderr
    both = done.stdout + done.stderr
    for text in ("to stdout", "to stderr", "a record"):
        assert both.count(text) == 1, both
    assert ("torchrunx_ray." in done.stderr) is configured
    assert done.stdout == ("" if configured else "to stdout\n")


def test_spawned_workers_are_heard_as_well(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        print("text")
        logging.getLogger("mine").warning("record")

    launcher = trx.Launcher(
        workers_per_host=1, backend=None, log_handlers=[kept], start_method="spawn"
    )
    launcher.run(speak)

    assert sorted(kept.said) == [("INFO", "text"), ("WARNING", "record")]


def test_failure_says_where_the_output_is(cluster: None, logs: Path) -> None:
    def fail() -> None:
        print("before")
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad") as caught:
        trx.Launcher(workers_per_host=1, backend=None).run(fail)

    assert f"All output of this launch: {run_dir(logs)}" in caught.value.__notes__
