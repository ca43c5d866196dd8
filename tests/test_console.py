"""What workers print reaches the driver's own streams."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.processes import wait_until

pytestmark = pytest.mark.unconfigured_logging


def test_one_workers_lines_arrive_verbatim(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def speak() -> None:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.system("echo from a child")
        print("without a newline", end="")

    trx.Launcher(workers_per_host=1).run(speak)

    out, err = capfd.readouterr()
    assert out == "to stdout\nfrom a child\nwithout a newline\n"
    assert err == "to stderr\n"


def test_rank_0_is_shown_unless_others_are_asked_for(
    launcher: trx.Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher.run(lambda: print("hello from", os.environ["RANK"]))

    assert capfd.readouterr().out == "hello from 0\n"


@pytest.mark.parametrize("ranks", ["all", (0, 1)])
def test_lines_of_several_workers_say_whose_they_are(
    cluster: None, ranks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = trx.Launcher(workers_per_host=2, console_ranks=ranks)
    (hostname,) = launcher.run(lambda: print("hello")).hostnames

    out = capfd.readouterr().out
    assert sorted(out.splitlines()) == [f"[{hostname}:0] hello", f"[{hostname}:1] hello"]


def test_prefix_stands_at_the_beginning_of_lines_only(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other characters that Python takes for line ends got one too."""
    launcher = trx.Launcher(workers_per_host=2, console_ranks="all")
    launcher.run(print, "a\u2028b\x0cc")

    out = capfd.readouterr().out
    assert sorted(line[-5:] for line in out.removesuffix("\n").split("\n")) == [
        "a\u2028b\x0cc",
        "a\u2028b\x0cc",
    ]


def test_nothing_is_lost_or_reordered_in_a_flood(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def flood() -> None:
        for i in range(50_000):
            print(f"line {i} {'x' * 80}")

    trx.Launcher(workers_per_host=1).run(flood)

    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [str(i) for i in range(50_000)]


@pytest.mark.alone
def test_output_without_newlines_is_not_quadratic(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """20 MB took 1.4 s, 60 MB 10.7 s."""
    launcher = trx.Launcher(workers_per_host=1)
    launcher.run(os.getpid)

    def write(megabytes: int) -> None:
        for _ in range(megabytes):
            os.write(1, b"x" * 1_000_000)

    def taken_s(megabytes: int) -> float:
        begun = time.monotonic()
        launcher.run(write, megabytes)
        assert capfd.readouterr().out.count("x") == megabytes * 1_000_000
        return time.monotonic() - begun

    assert taken_s(60) < 6 * taken_s(20), "three times as many"


def test_last_words_of_a_crash_arrive(cluster: None, capfd: pytest.CaptureFixture[str]) -> None:
    def crash() -> None:
        os.write(1, b"in the middle of a li")
        os.kill(os.getpid(), 11)

    with pytest.raises(trx.WorkerFailedError):
        trx.Launcher(workers_per_host=1).run(crash)

    assert capfd.readouterr().out == "in the middle of a li\n"


def test_what_is_not_utf8_is_shown(cluster: None, capfd: pytest.CaptureFixture[str]) -> None:
    trx.Launcher(workers_per_host=1).run(os.write, 1, b"\xff and on\n")

    assert capfd.readouterr().out == "\\xff and on\n"


def test_every_line_of_a_record_says_whose_it_is(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = trx.Launcher(workers_per_host=2, backend=None, console_ranks="all")
    launcher.run(lambda: logging.getLogger("mine").warning("one\ntwo"))

    lines = sorted(line.partition("] ")[2] for line in capfd.readouterr().err.splitlines())
    assert lines == ["WARNING:mine:one", "WARNING:mine:one", "two", "two"]


def test_ranks_that_there_are_not_are_no_silence(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    trx.Launcher(workers_per_host=2, backend=None, console_ranks=(5,)).run(print, "hello")

    said = capfd.readouterr()
    assert said.out == ""
    assert "this launch has only ranks 0 to 1" in said.err


@pytest.mark.slow
def test_lines_carry_the_runs_name_while_another_run_is_alive(
    cluster: None, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def speak(name: str) -> None:
        print(f"alone {name}", flush=True)
        print("\rdrawn and ", end="", flush=True)
        while not (tmp_path / "other").exists():
            time.sleep(0.01)
        print("ended", flush=True)
        time.sleep(0.5)  # what comes with the end of a line is shown with it
        print(f"beside {name}")
        logging.warning(f"record of {name}")

    def end() -> None:
        (tmp_path / "other").touch()
        while not (tmp_path / "over").exists():
            time.sleep(0.01)

    out, err = "", ""

    def has_been_shown(text: str) -> bool:
        nonlocal out, err
        said = capfd.readouterr()
        out, err = out + said.out, err + said.err
        return text in out

    launcher = trx.Launcher(workers_per_host=1, backend=None)
    first = launcher.submit(speak, "first")
    assert wait_until(lambda: has_been_shown("drawn and "), 60)
    other = launcher.submit(end)
    (hostname,) = first.result().hostnames
    (tmp_path / "over").touch()
    other.result()
    launcher.run(print, "alone again")

    assert wait_until(lambda: has_been_shown("alone again\n"))
    assert out.split("\n") == [
        "alone first",
        "\rdrawn and ended",
        f"[{first.name} {hostname}:0] beside first",
        "alone again",
        "",
    ]
    assert err == f"[{first.name} {hostname}:0] WARNING:root:record of first\n"
