"""What a function raises is what the launch raises; where that cannot be, it is shown as text."""

import argparse
import asyncio
import enum
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

import torchrunx_ray as trx
from tests.exceptions import (
    DecodeError,
    DiskError,
    FrozenError,
    ShardError,
    TwoArguments,
    Unpicklable,
)
from tests.soon import raised_soon
from torchrunx_ray.worker.function import exits


def test_users_exception_arrives_as_itself(launcher: trx.Launcher) -> None:
    def fail() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise TwoArguments("outer", 7) from error

    with pytest.raises(TwoArguments) as caught:
        launcher.run(fail)

    error = caught.value
    assert type(error) is TwoArguments
    assert str(error) == "outer (7)"
    assert error.code == 7
    cause = error.__cause__
    assert isinstance(cause, trx.RemoteFailure)
    assert cause.rank in (0, 1)
    assert cause.local_rank == cause.rank
    assert "KeyError: 'inner'" in cause.traceback
    assert "The above exception was the direct cause" in cause.traceback
    assert 'raise TwoArguments("outer", 7) from error' in str(cause)
    assert "outcome.py" not in str(cause), "our own frames are left out"
    assert any(f"pid {cause.pid}" in note for note in error.__notes__)


def test_exception_group_arrives_as_itself(launcher: trx.Launcher) -> None:
    def fail() -> None:
        raise ExceptionGroup("two things", [TwoArguments("one", 1), KeyError("other")])

    with pytest.raises(ExceptionGroup) as caught:
        launcher.run(fail)

    first, second = caught.value.exceptions
    assert (type(first), str(first)) == (TwoArguments, "one (1)")
    assert (type(second), second.args) == (KeyError, ("other",))
    assert isinstance(caught.value.__cause__, trx.RemoteFailure)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ShardError("shard 17"), id="constructor that words the message"),
        pytest.param(lambda: FrozenError("cold"), id="refuses attributes"),
        pytest.param(DecodeError, id="fields of a built-in"),
        pytest.param(lambda: DiskError("sda"), id="fields of OSError"),
        pytest.param(lambda: StopIteration("over"), id="StopIteration"),
        pytest.param(lambda: asyncio.CancelledError("mine"), id="CancelledError"),
        pytest.param(lambda: ExceptionGroup("two", [ValueError(), ShardError("b")]), id="group"),
        pytest.param(lambda: KeyError("key"), id="KeyError"),
        pytest.param(lambda: torch.cuda.OutOfMemoryError("no memory"), id="OutOfMemoryError"),
        pytest.param(lambda: subprocess.CalledProcessError(3, ["cmd"]), id="CalledProcessError"),
    ],
)
def test_exception_arrives_with_its_type_and_text(
    launcher: trx.Launcher, make: Callable[[], BaseException]
) -> None:
    """Constructors ran twice on their own message; StopIteration and CancelledError were changed
    by the coroutine that raised them; those that refuse attributes broke the report."""

    def fail() -> None:
        raise make()

    with pytest.raises(type(make())) as caught:
        launcher.run(fail)

    assert type(caught.value) is type(make())
    assert str(caught.value) == str(make())
    assert isinstance(caught.value.__cause__, trx.RemoteFailure)


def test_exception_that_cannot_be_pickled_is_shown_as_text(launcher: trx.Launcher) -> None:
    def fail() -> None:
        raise Unpicklable

    launcher.run(os.getpid)
    caught = raised_soon(trx.WorkerFailedError, launcher.run, fail)

    message = str(caught.value)
    assert "raised tests.exceptions.Unpicklable: holds a lock" in message
    assert "cannot pickle '_thread.lock'" in message
    assert "raise Unpicklable" in message


class OwnCode(enum.IntEnum):
    """Of a module that the agent must not import."""

    BAD = 4


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, None),
        (None, None),
        (3, "sys.exit(3)"),
        (OwnCode.BAD, "sys.exit(<OwnCode.BAD: 4>)"),
        ("why", "sys.exit('why')"),
    ],
)
def test_sys_exit(launcher: trx.Launcher, code: object, said: str | None) -> None:
    if said is None:
        assert list(launcher.run(sys.exit, code)) == [None, None]
        return
    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(sys.exit, code)
    assert f"called {said}" in str(caught.value)
    assert caught.value.exit_code == (code if isinstance(code, int) else None)


def parse(text: str) -> None:
    parser = argparse.ArgumentParser(prog="train.py")
    parser.add_argument("--lr")
    parser.parse_args(text.split())


def test_usage_error_of_argparse_is_told_in_a_few_lines(launcher: trx.Launcher) -> None:
    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(parse, "--nope")
    shown = "".join(traceback.format_exception_only(caught.value)).splitlines()
    assert "called sys.exit(2) in parse (test_exceptions.py:" in shown[0]
    assert shown[0].endswith("): train.py: error: unrecognized arguments: --nope")
    assert len(shown) <= 2, shown  # the other rank may have found it wrong as well
    assert "in parse_args" in caught.value.traceback


class OwnParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(f"{message}; see --help")


def choose(text: str) -> None:
    parser = OwnParser(prog="train.py")
    parser.parse_args(text.split())


def refuse(text: str) -> None:
    OwnParser(prog="train.py").error(text)


NO_LIBRARY = "/home/me/lib/python3-jobs/train.py"


def exit_of(call: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as caught:
        call()
    frames = caught.value.__traceback__
    assert frames is not None
    return exits.describe(caught.value, traceback.walk_tb(frames.tb_next))


def test_sys_exit_names_the_users_line_that_led_to_it() -> None:
    said = exit_of(lambda: choose("--nope"))
    assert "sys.exit(2) in choose (test_exceptions.py:" in said
    assert said.endswith("): train.py: error: unrecognized arguments: --nope; see --help")
    assert "sys.exit(2) in refuse (test_exceptions.py:" in exit_of(lambda: refuse("bad"))

    names: dict[str, Any] = {}
    exec(compile("def train(): raise SystemExit(3)", NO_LIBRARY, "exec"), names)
    assert exit_of(names["train"]) == "called sys.exit(3) in train (train.py:1)"


def test_keyboard_interrupt_in_the_function_is_a_worker_failure(launcher: trx.Launcher) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(trx.WorkerFailedError, match="KeyboardInterrupt"):
        launcher.run(interrupt)
