"""What fails is told with who said it and the place where it happened."""

import gc
import logging
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from torchrunx_ray.driver.report.failures import Failure, Failures
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.wire import messages


def failure_of(launcher: trx.Launcher, *args: Any, func: Any) -> BaseException:
    try:
        launcher.run(func, *args)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def failed(text: str, trace: str = "") -> messages.Failed:
    return messages.Failed(
        0, 1, 2, "ValueError", text, trace, None, text, None, in_collective=False
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            ["shard 7", "shard 8", "shard 7", "shard 9"],
            [
                "0.500 s later, rank 1 on vm, rank 3 on vm: ValueError: shard 7 (much the same on "
                "rank 2 on vm, rank 4 on vm)"
            ],
        ),
        (["shard 7"] * 2, ["0.500 s later, rank 1 on vm, rank 2 on vm: ValueError: shard 7"]),
        (
            ["shard 7", "no shard"],
            [
                "0.500 s later, rank 1 on vm: ValueError: shard 7",
                "0.500 s later, rank 2 on vm: ValueError: no shard",
            ],
        ),
    ],
)
def test_what_followed_is_said_of_those_who_said_it(said: list[str], told: list[str]) -> None:
    """The first one's number was told of all."""
    later = [Failure(500_000_001, "vm", i, failed(text)) for i, text in enumerate(said, 1)]
    failures = Failures([Failure(1, "vm", 0, failed("shard 0")), *later], [], Stacks({}), None)

    assert [note for note in failures.exception.__notes__ if " s later, " in note] == told


def fail_in_a_cell() -> None:
    raise ValueError("cell error")


@pytest.mark.slow
def test_failure_that_nobody_asked_for_tells_its_place(
    cluster: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path))

    def fail() -> None:
        print("something to read", flush=True)
        fail_in_a_cell()

    run = trx.Launcher(workers_per_host=1, backend=None).submit(fail)
    run.wait()
    del run
    gc.collect()

    (line,) = [r.getMessage() for r in caplog.records if "nobody asked" in r.getMessage()]
    number = fail_in_a_cell.__code__.co_firstlineno + 1
    directory = (tmp_path / "latest").resolve()
    place = f"({__file__}:{number}, in fail_in_a_cell); logs in {directory}"
    assert line.endswith(f": ValueError: cell error {place}")


@pytest.mark.parametrize(
    ("trace", "place"),
    [
        (
            'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n'
            '  File "b c.py", line 22, in <module>\nKeyError: 1\n',
            " (b c.py:22, in <module>)",
        ),
        (
            '  + Exception Group Traceback (most recent call last):\n  |   File "a.py", line 1, in f\n'
            "  | ExceptionGroup: two (2 sub-exceptions)\n  +-+---------------- 1 ----------------\n"
            '    | Traceback (most recent call last):\n    |   File "b.py", line 2, in g\n'
            "    | ValueError: x\n    +------------------------------------\n",
            " (a.py:1, in f)",
        ),
        (
            'Traceback (most recent call last):\n  File "a.py", line 1, in f\n'
            '  File "config.yaml", line 9\n    a: :\nSyntaxError: bad\n',
            " (a.py:1, in f)",
        ),
        ("ValueError: it has no frames", ""),
        ("", ""),
    ],
)
def test_place_is_the_innermost_line(trace: str, place: str) -> None:
    failures = Failures([Failure(2, "vm", 0, failed("no", trace))], [], Stacks({}), None)

    assert failures.in_brief == f"rank 0 on vm: ValueError: no{place}"


class BrokenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        raise RuntimeError("broken handler")


class BrokenStream:
    def write(self, text: str) -> int:  # noqa: ARG002
        raise RuntimeError("broken stream")

    def flush(self) -> None: ...


def place_in(function: Any) -> str:
    return f"({__file__}:{function.__code__.co_firstlineno + 1}, in {function.__name__})"


def speak() -> None:
    print("one")
    print("two", flush=True)


@pytest.mark.slow
def test_handler_that_fails_is_told_once_with_its_place(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    handlers: list[logging.Handler] = [BrokenHandler(), logging.StreamHandler(BrokenStream())]
    trx.Launcher(workers_per_host=1, backend=None, log_handlers=handlers).run(speak)

    told = [r.getMessage() for r in caplog.records if "log_handlers failed" in r.getMessage()]
    assert [line.rpartition("failures are not reported: ")[2] for line in told] == [
        f"RuntimeError: broken handler {place_in(BrokenHandler.emit)}",
        f"RuntimeError: broken stream {place_in(BrokenStream.write)}",
    ]


def test_handler_of_the_drivers_that_fails_is_told_once_with_its_place(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    broken = BrokenHandler()
    broken.addFilter(lambda record: hasattr(record, "hostname"))
    logging.root.addHandler(broken)
    try:
        trx.Launcher(workers_per_host=1, backend=None).run(speak)
    finally:
        logging.root.removeHandler(broken)

    (line,) = [r.getMessage() for r in caplog.records if "logging handler" in r.getMessage()]
    assert line.endswith(f"RuntimeError: broken handler {place_in(BrokenHandler.emit)}")


@pytest.mark.unconfigured_logging
def test_stream_of_the_drivers_that_fails_is_told_once_with_its_place(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", BrokenStream())
        patched.setattr(logging.getLogger("torchrunx_ray"), "warning", kept.warning)
        trx.Launcher(workers_per_host=1, backend=None).run(speak)

    (line,) = kept.lines
    assert line.endswith(f"RuntimeError: broken stream {place_in(BrokenStream.write)}")


class Kept:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, words: str, *args: object) -> None:
        self.lines.append(words % args)


class HoldsLock:
    def __init__(self) -> None:
        self.lock = threading.Lock()


class CannotSayItsState:
    def __getstate__(self) -> Any:
        raise ValueError("no state")


class CannotTakeItsState:
    def __init__(self) -> None:
        self.x = 1

    def __setstate__(self, state: object) -> None:
        raise ValueError("cannot take it")


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("make", "is_shown"), [(HoldsLock, None), (CannotSayItsState, "in __getstate__")]
)
def test_value_that_cannot_travel_is_shown_with_lines_of_the_users_only(
    launcher: trx.Launcher, make: Any, is_shown: str | None
) -> None:
    """Three tracebacks of payload.py, pickling.py and cloudpickle said the same sentence twice."""
    arrived = failure_of(launcher, func=make)

    assert type(arrived) is trx.PayloadError
    cause = arrived.__cause__
    assert isinstance(cause, trx.RemoteFailure)
    assert cause.rank == arrived.rank
    assert "/wire/" not in str(cause)
    assert "cloudpickle" not in str(cause)
    assert shown(arrived).count(f"of rank {cause.rank} cannot be pickled") == 1
    if is_shown is None:
        assert re.fullmatch(rf"on rank {cause.rank} \(\S+, pid {cause.pid}\)", str(cause))
    else:
        assert is_shown in cause.traceback


@pytest.mark.parametrize(
    ("make", "is_shown"), [(HoldsLock, None), (CannotSayItsState, "in __getstate__")]
)
def test_argument_that_cannot_travel_is_shown_with_lines_of_the_users_only(
    launcher: trx.Launcher, make: Any, is_shown: str | None
) -> None:
    arrived = failure_of(launcher, make(), func=print)

    assert type(arrived) is trx.PayloadError
    assert "cloudpickle" not in shown(arrived)
    if is_shown is None:
        assert shown(arrived).count("Traceback (most recent call last)") == 1
    else:
        assert is_shown in shown(arrived)
        assert isinstance(arrived.__cause__, ValueError)
        assert arrived.__cause__.__traceback__ is not None
        assert arrived.__cause__.__traceback__.tb_frame.f_code.co_name == "__getstate__"


def test_argument_that_cannot_be_unpickled_is_shown_with_lines_of_the_users_only(
    launcher: trx.Launcher,
) -> None:
    arrived = failure_of(launcher, CannotTakeItsState(), func=print)

    assert type(arrived) is trx.PayloadError
    assert isinstance(arrived.__cause__, trx.RemoteFailure)
    assert "in __setstate__" in arrived.__cause__.traceback
    assert "payload.py" not in arrived.__cause__.traceback
    assert "outcome.py" not in arrived.__cause__.traceback
