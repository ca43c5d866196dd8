"""What is shown of a run while it goes on, and what is known of it afterwards."""

import contextlib
import dataclasses
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.processes import wait_until
from tests.soon import SOON_S
from torchrunx_ray.driver.terminal.console import Console

pytestmark = pytest.mark.usefixtures("joined")

BEGIN = """
import sys
{before}
import os, time, ray
import torchrunx_ray as trx
ray.init(log_to_driver=False)
"""

SPEAKING = """
def speak():
    for i in range(6):
        sys.stderr.write(f"\\rdrawn {i}")
        sys.stderr.flush()
        time.sleep(0.5)
    sys.stderr.write("\\n")
    print("line of", os.environ["RANK"])

trx.launch(speak, workers_per_host=2, backend=None, preload=(), name="shown", **OPTIONS)
print("after")
"""


def on_a_terminal(script: str, folder: Path, **variables: str) -> str:
    """All that appears on a terminal of 100 columns."""
    (folder / "script.py").write_text(script)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color", **variables}
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed
            break
        shown += data
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_run_outlives_its_terminal(tmp_path: Path) -> None:
    """The status line could not be drawn: OSError, in place of what hours had brought."""
    (tmp_path / "script.py").write_text(
        BEGIN.format(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
        + """
def wait():
    while not os.path.exists("gone"):
        time.sleep(0.01)
    print("to nobody")
    time.sleep(1)
    return os.environ["RANK"]

result = trx.launch(wait, workers_per_host=2, backend=None)
with open("returned", "w") as file:
    file.write(" ".join(result))
"""
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while b"running 2 workers" not in shown:
        shown += os.read(ours, 65536)
    os.close(ours)
    (tmp_path / "gone").touch()
    process.wait(60)

    assert (tmp_path / "returned").read_text() == "0 1"


def after_ray_was_joined(shown: str) -> str:
    """And before the driver ends, with a code of colorama's."""
    return shown.rpartition("Connected to Ray cluster.")[2].removesuffix("\x1b[0m")


def test_terminal_has_a_status_line_beside_the_output(tmp_path: Path) -> None:
    script = BEGIN.format(before="OPTIONS = {}") + SPEAKING
    variables = {"TORCHRUNX_LOG_DIR": str(tmp_path / "logs"), "COLUMNS": "300"}
    shown = after_ray_was_joined(on_a_terminal(script, tmp_path, **variables))

    assert "shown-" in shown
    assert ": running 2 workers" in shown
    assert re.search(r"shown-\w+: done; logs in .*/logs/\S+_shown-\w+\r\n", shown)
    assert "drawn 3" in shown
    assert "drawn 5\r\n" in shown
    assert shown.count("line of 0") == 1
    assert "line of 1" not in shown
    assert shown.endswith("after\r\n")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is there again
    assert "running" not in shown.rpartition("\x1b[?25h")[2]


@pytest.mark.parametrize(
    ("before", "options"),
    [
        pytest.param("", {"progress": False}, id="progress=False", marks=pytest.mark.slow),
        pytest.param("sys.modules['rich'] = None", {}, id="without rich"),
    ],
)
def test_terminal_without_a_status_line_is_the_functions(
    before: str, options: dict[str, object], tmp_path: Path
) -> None:
    script = BEGIN.format(before=f"{before}\nOPTIONS = {options}") + SPEAKING
    shown = after_ray_was_joined(on_a_terminal(script, tmp_path))

    assert "".join(f"\rdrawn {i}" for i in range(3)) in shown
    assert "\rdrawn 5" in shown
    assert ("running 2 workers" in shown) is (options == {})
    assert "\x1b[" not in shown


@pytest.mark.slow
def test_driver_may_print_beside_a_status_line(tmp_path: Path) -> None:
    script = (
        BEGIN.format(before="import contextlib, io")
        + """
run = trx.Launcher(workers_per_host=1, backend=None).submit(time.sleep, 3)
while "running" not in repr(run):
    time.sleep(0.01)
time.sleep(1.5)
print("x" * 205)
print("in two", end=" ")
print("parts")
with contextlib.redirect_stdout(io.StringIO()):
    run.result()
print("y" * 205)
"""
    )
    shown = after_ray_was_joined(on_a_terminal(script, tmp_path))

    assert "running 1 worker" in shown
    assert "x" * 205 + "\r\n" in shown  # not wrapped
    assert "in two parts\r\n" in shown
    assert shown.endswith("y" * 205 + "\r\n")


@pytest.mark.slow
def test_handlers_that_write_to_the_terminal_are_not_mixed_with_a_status_line(
    tmp_path: Path,
) -> None:
    before = "import logging; logging.basicConfig(level=logging.INFO)\nOPTIONS = {}"
    shown = after_ray_was_joined(on_a_terminal(BEGIN.format(before=before) + SPEAKING, tmp_path))

    (line,) = [line for line in shown.splitlines() if "line of 0" in line]
    assert line.startswith("INFO:torchrunx_ray.")
    assert "\x1b[" not in shown


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_ranks_have_colours_on_a_terminal(
    variables: dict[str, str], coloured: bool, tmp_path: Path
) -> None:
    options = {"console_ranks": "all", "progress": False}
    script = BEGIN.format(before=f"OPTIONS = {options}") + SPEAKING
    shown = on_a_terminal(script, tmp_path, **variables)

    lines = [line for line in shown.splitlines() if "line of" in line]
    assert len(lines) == 2
    assert len({line.partition("m[")[0] for line in lines}) == 2  # each rank has its own
    assert all(("\x1b[" in line) is coloured for line in lines)


@pytest.mark.slow
def test_plain_lines_say_what_takes_long(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import time, torchrunx_ray as trx
launcher = trx.Launcher(workers_per_host=2, backend=None, name="shown", progress=True)
launcher.run(time.sleep, 4)
launcher.run(time.sleep, 0)
"""
    )
    assert done.stdout == ""
    (said,) = [line for line in done.stderr.splitlines() if "running" in line]
    assert said.endswith(": running 2 workers"), said
    # Without files it has nothing to say of these.
    assert re.search(r"^\d\d:\d\d shown-\w+: done$", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.slow
def test_nothing_is_shown_where_nobody_looks(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import time, torchrunx_ray as trx
trx.Launcher(workers_per_host=2, backend=None, name="shown").run(time.sleep, 4)
"""
    )
    assert "shown-" not in done.stdout + done.stderr


@pytest.mark.slow
def test_launch_that_waits_says_for_what(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import time, torchrunx_ray as trx
session = trx.Launcher(workers_per_host=7, backend=None).session()
run = trx.Launcher(workers_per_host=2, backend=None, progress=True).submit(time.sleep, 0)
time.sleep(4)
session.close()
run.result()
"""
    )
    assert "placing 0/1 hosts, waiting for 2 CPU on 1 more host" in done.stderr, done.stderr
    assert "waiting for room in the Ray cluster" in done.stderr
    assert "1 of 8 CPU" in done.stderr


def test_summary_tells_the_phases_and_where_the_logs_are(
    cluster: None, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        trx.Launcher(workers_per_host=1, backend=None, name="told").run(print, "hello")

    begin, said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("told-")]
    directory = (tmp_path / "latest").resolve()
    assert ": launching on 1 host (" in begin
    assert " done in " in said
    assert "template import" in said
    assert said.endswith(f"logs in {directory}")


@pytest.mark.slow
def test_timings_are_those_of_the_run(launcher: trx.Launcher) -> None:
    launcher.run(os.getpid)
    begun = time.monotonic()
    timings = launcher.run(time.sleep, 0.5).timings
    took_s = time.monotonic() - begun

    phases = ["place", "agents", "template import", "process group", "run", "results"]
    assert list(timings) == [*phases, "total"]
    assert sum(timings[phase] for phase in phases) == pytest.approx(timings["total"])
    assert 0.5 <= timings["run"] < timings["total"] <= took_s
    assert timings["template import"] == 0  # it was there


def test_timings_of_a_failure_name_the_phase_that_it_was_in(
    launcher: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        time.sleep(1)
        raise ValueError("bad")

    with caplog.at_level(logging.INFO, "torchrunx_ray"), pytest.raises(ValueError, match="bad"):
        launcher.run(fail)

    (said,) = [r.getMessage() for r in caplog.records if " failed after " in r.getMessage()]
    assert float(said.partition(", run ")[2].partition(",")[0]) >= 1
    assert "results 0.00" in said


@pytest.mark.slow
def test_driver_may_have_streams_that_can_only_write(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import sys, torchrunx_ray as trx

class Tee:
    def __init__(self, stream): self.stream = stream
    def write(self, text): self.stream.write(text)
    def flush(self): self.stream.flush()

sys.stdout, sys.stderr = Tee(sys.stdout), Tee(sys.stderr)
trx.launch(print, ("hello",), workers_per_host=2, backend=None, console_ranks="all")
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(":0] hello") == 1


def test_run_that_waits_for_its_turn_says_so(launcher: trx.Launcher) -> None:
    with launcher.session() as session:
        runs = [session.submit(time.sleep, 1) for _ in range(2)]
        waiting = lambda: "waiting for the session's other runs" in runs[1]._progress.status  # noqa: E731
        assert wait_until(waiting)
        for run in runs:
            run.result()


def test_run_that_is_being_stopped_says_so(launcher: trx.Launcher, tmp_path: Path) -> None:
    def resist() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / os.environ["RANK"]).touch()
        time.sleep(1000)

    run = dataclasses.replace(launcher, shutdown_timeout=2).submit(resist)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    run.cancel()
    assert wait_until(lambda: repr(run).endswith(": stopping 2 workers>"))
    run.wait()
    assert repr(run).endswith(": cancelled>")


def test_timeline_is_a_trace_of_every_rank(launcher: trx.Launcher, tmp_path: Path) -> None:
    result = launcher.run(time.sleep, 0.2)
    result.timeline(tmp_path / "trace.json")

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"driver", *result.hostnames, "template", "rank 0", "rank 1"} <= names
    spans = [e for e in events if e["ph"] == "X"]
    assert all(span["dur"] >= 0 for span in spans)
    runs = [span for span in spans if span["name"] == "run" and span["pid"] > 0]
    assert {span["tid"] for span in runs} == {1, 2}
    assert all(0.2e6 <= span["dur"] < SOON_S * 1e6 for span in runs)


def interrupted(run: trx.Run[Any]) -> KeyboardInterrupt:
    """What comes of Ctrl-C while somebody waits for the run."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        run.result()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        signal.signal(signal.SIGALRM, before)
    raise AssertionError("it has ended before")


def test_failure_is_told_while_the_others_take_long_to_stop(
    launcher: trx.Launcher, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """And is not lost where somebody then interrupts the run; the driver had not said a word."""

    def fail_or_save() -> None:
        if os.environ["RANK"] == "1":
            assert wait_until((tmp_path / "saves").exists)
            raise ValueError("shard 17 is truncated")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / "saves").touch()
        time.sleep(1000)

    launcher = dataclasses.replace(launcher, shutdown_timeout=6)
    run = launcher.submit(fail_or_save)
    failure = "rank 1 on .*: ValueError: shard 17 is truncated"
    says = lambda words: [  # noqa: E731
        record for record in caplog.records if re.search(words, record.getMessage())
    ]
    assert wait_until(lambda: says(f"has failed, and is stopping its workers.*{failure}"), 30)
    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        caught = interrupted(run)

    assert re.search(f"Before that, the run had failed: {failure}", "\n".join(caught.__notes__))
    assert says(f"stopped after .*; before that, the run had failed: {failure}")


def test_what_an_interrupt_makes_fail_is_not_told_as_its_reason(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    def save_and_exit() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        (tmp_path / os.environ["RANK"]).touch()
        time.sleep(1000)

    run = launcher.submit(save_and_exit)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    caught = interrupted(run)
    assert "had failed" not in "\n".join(caught.__notes__)


@pytest.mark.slow
def test_driver_may_put_a_stream_of_its_own_over_that_of_a_status_line(tmp_path: Path) -> None:
    """As a tee does; each wrote to the other."""
    script = """
class Tee:
    def __init__(self, below):
        self.below = below

    def write(self, text):
        copy.append(text)
        return self.below.write(text)

    def flush(self):
        self.below.flush()

copy = []
run = trx.Launcher(workers_per_host=1, backend=None, progress=True).submit(time.sleep, 4)
while type(sys.stdout).__name__ != "_Above":
    time.sleep(0.01)
sys.stdout = Tee(sys.stdout)
print("said through the tee")
run.result()
print("copied", "".join(copy).count("said through the tee"))
"""
    shown = on_a_terminal(BEGIN.format(before="") + script, tmp_path)

    assert shown.count("said through the tee") == 1, shown
    assert "copied 1" in shown


def test_line_of_the_drivers_own_that_has_not_ended_is_shown_beside_a_status_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A progress bar of the driver's was invisible, and all that it drew was kept."""
    terminal, theirs = pty.openpty()
    os.set_blocking(terminal, False)
    with open(theirs, "w", buffering=1) as file, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", file)
        patched.setattr(sys, "stderr", file)
        patched.setenv("TERM", "xterm-256color")
        shown = _shown_of_the_drivers_own(terminal)
    os.close(terminal)
    assert b"\rbar 99%" in shown
    assert b"bar 98%" not in shown


def _shown_of_the_drivers_own(terminal: int) -> bytes:
    """Draw and print beside a status line, and return what is shown once that is gone."""
    shown = b""

    def shows(text: bytes) -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(terminal, 2**16)
        return text in shown

    console = Console()
    console.add_status("a run", lambda: "00:01 train: running")
    try:
        for percent in range(100):
            sys.stderr.write(f"\rbar {percent}%")
        sys.stderr.flush()
        assert wait_until(lambda: shows(b"bar 99%"), 20)
        sys.stdout.write("no newline yet")
        sys.stdout.flush()
        assert wait_until(lambda: shows(b"no newline yet"), 20)
        sys.stdout.write(", but now\n")
        assert wait_until(lambda: shows(b"no newline yet, but now\r\n"), 20)
    finally:
        shown = b""
        console.remove_status("a run")
    print("end of test")
    assert wait_until(lambda: shows(b"end of test"), 20)
    return shown
