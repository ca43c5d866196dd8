"""What a worker and its children write arrives whole and once, whatever it is."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.logs import Kept


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


def test_spawned_workers_are_heard_as_well(one: trx.Launcher, kept: Kept) -> None:
    def speak() -> None:
        print("text")
        logging.getLogger("mine").warning("record")

    launcher = trx.Launcher(
        workers_per_host=1, backend=None, log_handlers=[kept], start_method="spawn"
    )
    launcher.run(speak)

    assert sorted(kept.said) == [("INFO", "text"), ("WARNING", "record")]


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


@pytest.mark.slow
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


def test_what_is_printed_is_whole_and_once_without_pythonunbuffered(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That variable hid that the template never wrote, and that each fork wrote it again."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tmp_path / "says_at_import.py").write_text(
        "import ctypes\nprint('by Python')\nctypes.CDLL(None).puts(b'by C')\n"
    )
    done = run_script(
        """
import os, sys
import torchrunx_ray as trx
os.environ["TORCHRUNX_LOG_DIR"] = "logs"
os.environ["PYTHONPATH"] += os.pathsep + os.getcwd()

def speak():
    print("past the redirect", file=sys.__stdout__)

with trx.Launcher(
    workers_per_host=2, backend=None, console_ranks=(), preload=("says_at_import",)
).session() as session:
    session.run(speak)
    session.run(speak)
"""
    )

    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text() for path in (tmp_path / "logs").glob("2*/*.log"))
    assert written.count("by Python") == 1, written
    assert written.count("by C") == 1, written
    assert written.count("past the redirect") == 4, written
