"""The reason for which an attempt ended decides if it counts: found by evidence, not by what else happened."""

import signal
from typing import Any

import pytest

import torchrunx_ray as trx
from torchrunx_ray.driver.report.failures import Failure, Failures, Report
from torchrunx_ray.driver.report.history import AttemptRecord, Why
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running.restart_policy import RestartPolicy, Verdict
from torchrunx_ray.driver.running.stop_request import StopRequest
from torchrunx_ray.driver.running.why_ended import why_failed
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.stop_board import StopReason


def raised(*, in_collective: bool = False, unraisable: str = "") -> messages.Failed:
    return messages.Failed(
        0, 1, 0, "ValueError", "", "a traceback", None, unraisable, None, in_collective
    )


DIED = messages.Died(messages.Exited(0, 1, 0, None, signal.SIGKILL, 0), (), None)
GONE = messages.AgentFailed(0, "the host was silent", "")
EXIT = raised(unraisable="called sys.exit(1)")
IN_COLLECTIVE = raised(in_collective=True)


def request(reason: StopReason | None, at_ns: int) -> Any:
    """A request to stop, as far as the reason of the end depends on it."""
    made = StopRequest([])
    if reason is not None:
        made.make(reason, None)
        made._first_ns = at_ns
    return made


@pytest.mark.parametrize(
    ("failed", "lost", "why"),
    [
        ([(1, "a", raised()), (2, "b", GONE)], ["b"], "failed"),
        ([(1, "a", DIED), (2, "b", GONE)], ["b"], "failed"),
        ([(1, "a", EXIT), (2, "b", GONE)], ["b"], "failed"),
        ([(1, "b", raised()), (2, "b", GONE)], ["b"], "failed"),
        ([(2, "a", raised()), (1, "b", GONE)], ["b"], "host lost"),
        ([(1, "a", IN_COLLECTIVE), (2, "b", GONE)], ["b"], "host lost"),
        ([(1, "b", DIED), (2, "b", GONE)], ["b"], "host lost"),
        ([(1, "b", EXIT), (2, "b", GONE)], ["b"], "host lost"),
        ([(1, "b", GONE)], [], "failed"),
        ([(1, "a", IN_COLLECTIVE)], [], "failed"),
    ],
)
def test_failure_before_the_loss_of_a_host_has_a_cause_of_its_own(
    failed: list[tuple[int, str, Report]], lost: list[str], why: Why
) -> None:
    assert why_failed(failures(failed), request(None, 0), lost) == why


@pytest.mark.parametrize(
    ("failed", "lost", "why"),
    [
        ([(11, "a", raised())], [], "failed"),
        ([(11, "a", DIED)], [], "failed"),
        ([(11, "a", GONE)], [], "failed"),
        ([(11, "a", EXIT)], [], "failed"),
        ([(9, "a", raised())], [], "failed"),
        ([(11, "a", IN_COLLECTIVE)], [], "drained"),
        ([(21, "a", raised())], [], "drained"),
        ([(21, "a", EXIT)], [], "drained"),
        ([(11, "b", DIED)], ["b"], "drained"),
        ([(11, "b", GONE)], ["b"], "drained"),
        ([(11, "b", raised())], ["b"], "failed"),
        ([(9, "b", GONE)], ["b"], "host lost"),
    ],
)
def test_failure_after_the_request_and_before_the_stop_has_a_cause_of_its_own(
    failed: list[tuple[int, str, Report]], lost: list[str], why: Why
) -> None:
    """The function was asked at 10, and the launch stopped the workers at 20."""
    assert why_failed(failures(failed, stopped_at_ns=20), request("drain", 10), lost) == why


def failures(failed: list[tuple[int, str, Report]], stopped_at_ns: int | None = None) -> Failures:
    ranks = {"a": 0, "b": 1}
    made = [
        Failure(ns, host, None if report is GONE else ranks[host], report)
        for ns, host, report in failed
    ]
    return Failures(made, [], Stacks({}), None, stopped_at_ns, started=(0, 1))


def loss(policy: RestartPolicy, lasted_s: float = 1) -> Verdict:
    policy.note_end(AttemptRecord(0, (), 1, 0.0, lasted_s, "host lost", None))
    return policy.verdict("host lost", failures([(1, "b", GONE)]))


def test_losses_in_a_row_count_after_some_time() -> None:
    policy = RestartPolicy(trx.Launcher(hostnames=(1, 2), max_restarts=1))
    assert [loss(policy) for _ in range(5)] == [Verdict.GO_ON] * 5
    assert loss(policy) is Verdict.RESTART
    policy.restarts += 1
    assert loss(policy) is Verdict.END
    assert policy.last_words == (
        "7 attempts in a row have lost a host less than 60 s after they began, so the function may be the cause. Such a "
        "loss counts as a failure. This was restart 1 of 1; no restart is left."
    )


def test_run_may_lose_all_hosts_that_it_can_do_without() -> None:
    policy = RestartPolicy(trx.Launcher(hostnames=(2, 10)))
    assert [loss(policy) for _ in range(8)] == [Verdict.GO_ON] * 8
    assert loss(policy) is Verdict.END


def test_loss_after_a_calm_time_begins_another_series() -> None:
    policy = RestartPolicy(trx.Launcher(hostnames=(1, 2)))
    for _ in range(4):
        assert [loss(policy) for _ in range(5)] == [Verdict.GO_ON] * 5
        assert loss(policy, lasted_s=61) is Verdict.GO_ON
