"""A run whose workers fail is started again, as often as `max_restarts` allows."""

import ast
import asyncio
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup
from torch.distributed.distributed_c10d import _get_default_store

import torchrunx_ray as trx
from tests.announced import announce_and_wait, started
from tests.logs import Kept
from tests.nodes import groups
from tests.processes import (
    above,
    agent_pid,
    is_alive,
    kill_next,
    note,
    parent,
    pids,
    titled,
    wait_until,
)
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.running import stopping
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
    assert "This was restart 2 of 2; no restart is left." in caught.value.__notes__


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


def test_no_key_of_an_earlier_attempt_is_left_in_the_store(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    """With torchrun, the next attempt reads the addresses that a killed one has left (pytorch#135712)."""

    def meet() -> dict[str, bytes]:
        dist.all_reduce(torch.ones(1))  # every rank has told the others where it is
        store = _get_default_store()
        mine = f"of attempt {trx.context().attempt}, rank {dist.get_rank()}"
        store.set(mine, mine)
        store.get(mine)  # `set` does not wait for the server
        dist.barrier()
        seen = {key: store.get(key) for key in store.list_keys()}
        dist.barrier()
        if trx.context().attempt == 0:
            note(tmp_path / str(dist.get_rank()), repr(seen))
            if dist.get_rank() == 1:
                assert wait_until((tmp_path / "0").exists)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return seen

    second = patient.run(meet).rank(0)
    first: dict[str, bytes] = ast.literal_eval((tmp_path / "0").read_text())

    def marks(of_attempt: dict[str, bytes]) -> set[str]:
        return {key for key in of_attempt if "of attempt" in key}

    assert {mark[-len("of attempt 0, rank 0") :] for mark in marks(first)} == {
        "of attempt 0, rank 0",
        "of attempt 0, rank 1",
    }
    assert len(marks(second)) == 2
    assert not marks(first) & marks(second)
    addresses = [key for key in first if key in second and len(first[key]) > 20]
    assert addresses, first
    assert not [key for key in addresses if first[key] == second[key]]


def test_agent_that_is_killed_while_it_takes_the_place_of_another_is_replaced(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    def announce_and_wait() -> int:
        attempt = trx.context().attempt
        if attempt == 0:
            note(tmp_path / os.environ["RANK"], str(agent_pid()))
            time.sleep(1000)
        return attempt

    run = patient.submit(announce_and_wait)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    known = titled("ray::Agent")
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    assert kill_next(lambda: titled("ray::Agent"), known)

    assert run.result(timeout=60).rank(0) >= 1


def victim(whom: str, worker_pid: int) -> int:
    if whom != "store":
        return above(worker_pid)[whom]
    template = above(worker_pid)["template"]
    (store,) = (
        pid for pid in pids() if parent(pid) == template and os.getpgid(pid) == os.getpgid(template)
    )  # workers lead groups of their own
    return store


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


def test_predicate_that_raises_the_failure_again_ends_the_run_with_it(cluster: None) -> None:
    """It became its own cause, in the place of the traceback of the worker."""

    def ask(error: BaseException) -> bool:
        raise error

    def fail() -> None:
        raise KeyError("of the function")

    launcher = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=ask)
    with pytest.raises(KeyError, match="of the function") as caught:
        launcher.run(fail)
    assert isinstance(caught.value.__cause__, trx.RemoteFailure)


def test_launch_error_of_a_predicate_is_no_error_of_the_next_start(cluster: None) -> None:
    """Its text was told as the reason why the run could not be started again."""

    def ask(_: BaseException) -> bool:
        raise trx.LaunchError("of the predicate")

    def fail() -> None:
        raise KeyError("of the function")

    launcher = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=ask)
    with pytest.raises(trx.LaunchError, match="of the predicate") as caught:
        launcher.run(fail)
    assert isinstance(caught.value.__cause__, KeyError)


def test_cancel_between_two_attempts_ends_the_run(cluster: None) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def ask(_: BaseException) -> bool:
        asked.set()
        return goes_on.wait(60)

    def fail() -> None:
        raise KeyError

    run = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=ask).submit(fail)
    assert asked.wait(30)
    run.cancel()
    try:
        assert wait_until(run.done, 20)
        assert run.cancelled()
    finally:
        goes_on.set()


class Blocked(Kept):
    """A handler that blocks until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.goes_on.wait(120)


def test_cancel_between_two_attempts_does_not_wait_for_output_that_nobody_takes(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LAST_LINES_S", 0.5)
    asked, blocked = threading.Event(), Blocked()

    def ask(_: BaseException) -> bool:
        asked.set()
        return blocked.goes_on.wait(120)

    def speak_and_fail() -> None:
        print("a line")
        raise KeyError

    launcher = trx.Launcher(
        workers_per_host=1, max_restarts=1, restart_if=ask, log_handlers=[blocked]
    )
    run = launcher.submit(speak_and_fail)
    try:
        assert asked.wait(30)
        run.cancel()
        assert wait_until(run.done, 20)
    finally:
        blocked.goes_on.set()


@pytest.mark.parametrize("kind", [StopIteration, SystemExit, asyncio.CancelledError])
def test_predicate_may_raise_anything(cluster: None, kind: type[BaseException]) -> None:
    def ask(_: BaseException) -> bool:
        raise kind

    def fail() -> None:
        raise KeyError("of the function")

    launcher = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=ask)
    with pytest.raises(RuntimeError, match=f"restart_if raised {kind.__name__}") as caught:
        launcher.run(fail)
    assert isinstance(caught.value.__cause__, KeyError)


def test_launch_raises_the_object_that_the_predicate_got(cluster: None) -> None:
    asked: list[BaseException] = []

    def fail() -> None:
        raise KeyError

    launcher = trx.Launcher(
        workers_per_host=1, max_restarts=1, restart_if=lambda error: asked.append(error) or False
    )
    with pytest.raises(KeyError) as caught:
        launcher.run(fail)
    assert asked == [caught.value]
    cause = caught.value.__cause__
    assert isinstance(cause, trx.RemoteFailure)
    assert len(cause.attempts) == 1


def test_failure_is_not_lost_if_no_other_attempt_can_begin(
    patient: trx.Launcher, tmp_path: Path
) -> None:
    """As when somebody removes the placement group meanwhile."""

    def remove_group(_: BaseException) -> bool:
        for group_id, group in ray.util.placement_group_table().items():
            if group["state"] == "CREATED":
                identity = ray.PlacementGroupID(bytes.fromhex(group_id))
                ray.util.remove_placement_group(PlacementGroup(identity))
        return True

    with pytest.raises(ValueError, match="the first attempt") as caught:
        dataclasses.replace(patient, restart_if=remove_group).run(fail_once)
    notes = "\n".join(caught.value.__notes__)
    assert "The run could not be started again: the placement group" in notes


def test_timings_have_the_earlier_attempts_apart(patient: trx.Launcher) -> None:
    def fail_late() -> None:
        if trx.context().attempt == 0:
            time.sleep(1)
            raise ValueError

    timings = patient.run(fail_late).timings
    assert timings["earlier attempts"] > 1
    assert timings["process group"] < 1 < timings["total"]


def test_cancel_in_a_later_attempt_stops_its_workers(patient: trx.Launcher, tmp_path: Path) -> None:
    def fail_and_wait() -> None:
        if trx.context().attempt == 0:
            raise ValueError
        note(tmp_path / os.environ["RANK"], str(os.getpid()))
        time.sleep(1000)

    run = patient.submit(fail_and_wait)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    run.cancel()
    with pytest.raises(CancelledError):
        run.result(timeout=30)
    assert not any(is_alive(int(path.read_text())) for path in tmp_path.iterdir())


@pytest.mark.exhaustive
def test_many_restarts_leave_nothing(cluster: None) -> None:
    def fail_often() -> int:
        if trx.context().attempt < 40:
            raise ValueError
        return agent_pid()

    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=40)
    with launcher.session() as session:
        (agent,) = session.run(fail_often)
        before = len(os.listdir(f"/proc/{agent}/fd")), len(os.listdir("/proc/self/fd"))
        assert list(session.run(fail_often)) == [agent]
        after = len(os.listdir(f"/proc/{agent}/fd")), len(os.listdir("/proc/self/fd"))
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2


def test_session_goes_on_after_a_restarted_run(patient: trx.Launcher) -> None:
    with patient.session() as session:
        assert [each.attempt for each, _ in session.run(fail_once)] == [1, 1]
        assert [each.attempt for each, _ in session.run(fail_once)] == [1, 1]


def test_files_say_where_an_attempt_begins(
    patient: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path))

    def say_and_fail() -> None:
        print("here is attempt", trx.context().attempt)
        if trx.context().attempt == 0:
            raise ValueError

    result = dataclasses.replace(patient, log_handlers="auto").run(say_and_fail)
    assert result.log_directory is not None
    (of_rank_0,) = result.log_directory.glob("*[[]0].log")
    said = of_rank_0.read_text()
    assert [line.rpartition(": ")[2] for line in said.splitlines()] == [
        "here is attempt 0",
        "attempt 1 begins",
        "here is attempt 1",
    ]


@pytest.mark.parametrize("fail", [lambda: (_ for _ in ()), threading.Lock])
def test_value_that_cannot_be_sent_is_no_reason_for_another_attempt(
    patient: trx.Launcher, fail: Callable[[], Any]
) -> None:
    with pytest.raises(trx.PayloadError) as caught:
        patient.run(fail)
    assert len(caught.value.attempts) == 1


def kills_its_agent_once(folder: Path) -> Path:
    """A file that the agent of a host has bash source, and that kills this agent if asked to."""
    file = folder / "env.sh"
    file.write_text(f"if [ -e {folder}/kill ]; then rm {folder}/kill; kill -9 $PPID; fi\n")
    return file


@pytest.mark.parametrize("restarts", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_agent_that_is_killed_between_two_attempts_costs_one_more_restart(
    cluster: None, tmp_path: Path, restarts: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    one = trx.Launcher(
        workers_per_host=1, max_restarts=restarts, env_file=kills_its_agent_once(tmp_path), linger=0
    )
    run = one.submit(announce_and_wait, folder)
    assert wait_until(lambda: len(started(folder, 0)) == 1, 60)
    note(tmp_path / "kill", "")
    os.kill(above(started(folder, 0)[0][1])["agent"], signal.SIGKILL)

    if restarts == 2:
        assert wait_until(lambda: len(started(folder, 1)) == 1, 60)
        (folder / "return 1").touch()
        (seen,) = run.result(timeout=60)
        assert (seen.attempt, seen.restarts) == (1, 2)
        assert "restart 2 of 2, since the last start has failed" in caplog.text
    else:
        with pytest.raises(trx.AgentFailedError) as caught:
            run.result(timeout=60)
        assert any("could not be started again" in note for note in caught.value.__notes__)
        assert len(caught.value.attempts) == 1
    assert not (tmp_path / "kill").exists()


def raise_once() -> int:
    if trx.context().attempt == 0:
        raise ValueError
    return trx.context().attempt


def test_run_tells_that_it_waits_for_restart_if(
    cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(_: BaseException) -> bool:
        return wait_until(lambda: "waits for the answer of restart_if" in caplog.text, 30)

    one = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=ask)
    assert list(one.run(raise_once)) == [1]


def test_restart_if_may_ask_and_cancel_its_run(cluster: None) -> None:
    seen: list[Any] = []
    known = threading.Event()

    def ask(_: BaseException) -> bool:
        known.wait(30)
        seen.extend([run.done(), run.running(), bool(run.stacks()), run.spares, run.cancel()])
        return True

    one = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=ask)
    run = one.submit(raise_once)
    known.set()
    with pytest.raises(CancelledError):
        run.result(timeout=30)
    assert wait_until(lambda: len(seen) == 5)
    assert seen == [False, True, False, (), True]


def test_restart_if_that_returns_a_coroutine_is_refused(cluster: None) -> None:
    async def decide(_: BaseException) -> bool:
        return True

    one = trx.Launcher(workers_per_host=1, max_restarts=1, restart_if=lambda e: decide(e))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="restart_if returned a coroutine"):
        one.run(raise_once)


@pytest.mark.exhaustive
def test_two_hundred_restarts_leave_nothing_behind(cluster: None) -> None:
    samples: list[list[int]] = []

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    def ask(_: BaseException) -> bool:
        count[0] += 1
        if count[0] in (100, 200):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            handlers = len(logging.root.handlers) + len(logging.getLogger("torchrunx_ray").handlers)
            descriptors = len(os.listdir("/proc/self/fd"))
            there = loop.start(tasks()).result(10)
            held = len(groups("CREATED", "PENDING"))
            samples.append([descriptors, handlers, there, threading.active_count(), held, pages])
        return True

    def fail_often() -> int:
        if trx.context().attempt < 200:
            raise ValueError
        return trx.context().attempt

    count = [0]
    one = trx.Launcher(workers_per_host=1, backend=None, max_restarts=200, restart_if=ask)
    assert list(one.run(fail_often)) == [200]
    before, after = samples
    assert after[5] - before[5] < 5 * 2**20 // os.sysconf("SC_PAGE_SIZE"), samples
    assert all(b <= a + 3 for a, b in zip(before[:5], after[:5], strict=True)), samples


def test_context_is_for_workers() -> None:
    with pytest.raises(RuntimeError, match="outside of a worker"):
        trx.context()
