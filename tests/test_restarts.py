"""A run whose workers fail is started again, as often as `max_restarts` allows."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchrunx_ray as trx
from tests.processes import above, note, wait_until
from torchrunx_ray.worker.function.context import Context


@pytest.fixture
def patient(cluster: None) -> trx.Launcher:
    return trx.Launcher(workers_per_host=2, max_restarts=2)


def fail_once() -> tuple[Context, dict[str, str]]:
    if trx.context().attempt == 0 and os.environ["RANK"] == "1":
        raise ValueError("the first attempt")
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "MASTER_PORT")
    return trx.context(), {name: os.environ[name] for name in names}


def test_failure_is_followed_by_another_attempt_on_all_ranks(
    patient: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    result = patient.run(fail_once)

    contexts, variables = zip(*result, strict=True)
    assert [(each.rank, each.attempt, each.restarts) for each in contexts] == [(0, 1, 1), (1, 1, 1)]
    assert {each["TORCHELASTIC_RESTART_COUNT"] for each in variables} == {"1"}
    assert {each["TORCHELASTIC_MAX_RESTARTS"] for each in variables} == {"2"}
    first, second = result.attempts
    assert (first.number, first.world_size, first.why) == (0, 2, "failed")
    assert first.failure is not None
    assert "ValueError: the first attempt" in first.failure
    assert (second.number, second.why, second.failure) == (1, "returned", None)
    assert first.begun < first.ended <= second.begun < second.ended
    (told,) = [r.getMessage() for r in caplog.records if "restart 1 of 2" in r.getMessage()]
    assert told.count("\n") == 1
    assert "rank 1 on" in told


def test_last_failure_is_raised_as_itself_with_all_attempts(patient: trx.Launcher) -> None:
    def fail() -> None:
        raise ValueError(f"attempt {trx.context().attempt}")

    with pytest.raises(ValueError, match="attempt 2") as caught:
        patient.run(fail)
    cause = caught.value.__cause__
    assert isinstance(cause, trx.RemoteFailure)
    assert [each.number for each in cause.attempts] == [0, 1, 2]
    assert [each.why for each in cause.attempts] == ["failed"] * 3


@pytest.mark.parametrize("whom", ["worker", "store", "template", "agent"])
def test_killed_process_is_replaced(patient: trx.Launcher, whom: str, tmp_path: Path) -> None:
    def announce_and_wait() -> int:
        attempt = trx.context().attempt
        if attempt == 0:
            note(tmp_path / os.environ["RANK"], str(os.getpid()))
            time.sleep(1000)
        return attempt

    run = patient.submit(announce_and_wait)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    pid = int((tmp_path / "1").read_text())
    os.kill(pid if whom == "worker" else victim(whom, pid), signal.SIGKILL)

    assert list(run.result(timeout=60)) == [1, 1]


def victim(whom: str, worker_pid: int) -> int:
    return above(worker_pid)[whom]


def test_values_of_a_failed_attempt_are_not_in_the_result(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    def return_or_fail() -> int:
        attempt = trx.context().attempt
        if attempt == 0 and os.environ["RANK"] == "1":
            wait_until((tmp_path / "returned").exists)
            raise ValueError
        if attempt == 0:
            note(tmp_path / "returned", "")
        return attempt

    assert list(patient.run(return_or_fail)) == [1, 1]


def never(_: BaseException) -> bool:
    return False


def test_predicate_decides_by_the_exception(cluster: None) -> None:
    asked: list[BaseException] = []

    def ask(error: BaseException) -> bool:
        asked.append(error)
        return len(asked) == 1

    def fail() -> None:
        raise KeyError(trx.context().attempt)

    launcher = trx.Launcher(workers_per_host=1, max_restarts=5, restart_if=ask)
    with pytest.raises(KeyError) as caught:
        launcher.run(fail)
    assert [error.args for error in asked] == [(0,), (1,)]
    assert isinstance(asked[0].__cause__, trx.RemoteFailure)
    assert caught.value.args == (1,)


def test_predicate_that_raises_ends_the_run_with_both_errors(cluster: None) -> None:
    def ask(_: BaseException) -> bool:
        raise RuntimeError("of the predicate")

    def fail() -> None:
        raise KeyError("of the function")

    launcher = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=ask)
    with pytest.raises(RuntimeError, match="of the predicate") as caught:
        launcher.run(fail)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("fail", [lambda: (_ for _ in ()), lambda: open(os.devnull)])
def test_value_that_cannot_be_sent_is_no_reason_for_another_attempt(
    patient: trx.Launcher, fail: Callable[[], Any]
) -> None:
    with pytest.raises(trx.PayloadError) as caught:
        patient.run(fail)
    assert len(caught.value.attempts) == 1


def test_context_is_for_workers() -> None:
    with pytest.raises(RuntimeError, match="outside of a worker"):
        trx.context()


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("max_restarts", -1, ValueError),
        ("max_restarts", 1.5, TypeError),
        ("max_restarts", True, TypeError),
        ("restart_if", 3, TypeError),
    ],
)
def test_wrong_values_are_refused(option: str, value: object, kind: type[Exception]) -> None:
    options: Any = {option: value}
    with pytest.raises(kind, match=rf"{option}={value!r}: expected"):
        trx.Launcher(**options)
