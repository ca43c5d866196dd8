"""A function can ask whether it should stop, before anybody signals it."""

import os
import pickle
import signal
import sys
import time
import timeit
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import torchrunx_ray as trx
from tests.asking import ask_to_stop
from tests.clusters.shifted_clock import compiler, shifted_clock
from tests.conftest import RunScript
from tests.processes import agent_pid, is_alive, note, wait_until
from tests.soon import soon
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.wire.messages import StartMethod

FAR_S = 500.0
"""Time that no test waits for."""


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def start_method(request: pytest.FixtureRequest) -> StartMethod:
    return request.param


@pytest.fixture
def pair(cluster: None) -> trx.Launcher:
    """Two workers without a group, whose grace ends no test."""
    return trx.Launcher(workers_per_host=2, backend=None, shutdown_timeout=FAR_S)


def are_ready(folder: Path, count: int = 2) -> bool:
    return wait_until(lambda: len(list(folder.glob("ready *"))) == count, 30)


def say_ready(folder: Path) -> None:
    note(folder / f"ready {os.environ['RANK']}", os.getpid())


def stop_when_asked(folder: Path) -> tuple[trx.StopAsked, float]:
    """Return the request, and the time at which it was seen."""
    assert trx.context().stop_asked is None
    say_ready(folder)
    assert wait_until(lambda: trx.context().stop_asked is not None, 60)
    asked = trx.context().stop_asked
    assert asked is not None
    return asked, time.time()


def test_function_that_returns_after_it_was_asked_is_not_signalled(
    pair: trx.Launcher, start_method: StartMethod, tmp_path: Path
) -> None:
    run = replace(pair, start_method=start_method).submit(stop_when_asked, tmp_path)
    assert are_ready(tmp_path)
    asked_at = time.time()
    attempt = ask_to_stop(run, "drain", FAR_S)

    for asked, seen_at in run.result(timeout=60):
        assert asked.reason == "drain"
        assert asked.deadline is not None
        assert asked_at + FAR_S <= asked.deadline <= seen_at + FAR_S
    assert attempt.stop_request.seen_by == {0, 1}
    assert attempt.failures is None
    assert attempt._stopping.order is None


def test_request_without_a_deadline_has_none(pair: trx.Launcher, tmp_path: Path) -> None:
    run = pair.submit(stop_when_asked, tmp_path)
    assert are_ready(tmp_path)
    ask_to_stop(run, "resize", None)

    assert [each for each, _ in run.result(timeout=60)] == [trx.StopAsked("resize", None)] * 2


def test_rank_that_returns_without_a_look_has_not_seen_the_request(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def look_on_rank_1() -> None:
        say_ready(tmp_path)
        wait_until((tmp_path / "gate").exists, 60)
        if os.environ["RANK"] == "1":
            assert wait_until(lambda: trx.context().stop_asked is not None, 60)

    run = pair.submit(look_on_rank_1)
    assert are_ready(tmp_path)
    attempt = ask_to_stop(run, "drain", FAR_S)
    (tmp_path / "gate").touch()
    run.result(timeout=60)
    assert attempt.stop_request.seen_by == {1}


def test_look_before_the_request_does_not_count(pair: trx.Launcher, tmp_path: Path) -> None:
    def look_early() -> None:
        assert trx.context().stop_asked is None
        say_ready(tmp_path)
        wait_until((tmp_path / "gate").exists, 60)

    run = pair.submit(look_early)
    assert are_ready(tmp_path)
    attempt = ask_to_stop(run, "drain", FAR_S)
    (tmp_path / "gate").touch()
    run.result(timeout=60)
    assert attempt.stop_request.seen_by == set()


def test_more_urgent_request_replaces_another(pair: trx.Launcher, tmp_path: Path) -> None:
    def note_requests() -> list[tuple[str, bool]]:
        seen: list[tuple[str, bool]] = []
        say_ready(tmp_path)
        while not seen or seen[-1][0] != "cancel":
            asked = trx.context().stop_asked
            if asked is not None and (found := (asked.reason, asked.deadline is None)) not in seen:
                seen.append(found)
                note(tmp_path / f"{len(seen)} {os.environ['RANK']}", "")
        return seen

    def both_have_seen(number: int) -> bool:
        return wait_until(lambda: len(list(tmp_path.glob(f"{number} *"))) == 2, 30)

    run = pair.submit(note_requests)
    assert are_ready(tmp_path)
    ask_to_stop(run, "resize", None)
    assert both_have_seen(1)
    ask_to_stop(run, "resize", FAR_S)
    assert both_have_seen(2)
    ask_to_stop(run, "drain", None)
    assert both_have_seen(3)
    ask_to_stop(run, "resize", FAR_S / 2)  # less urgent
    attempt = ask_to_stop(run, "cancel", FAR_S)
    seen = [("resize", True), ("resize", False), ("drain", True), ("cancel", False)]
    assert list(run.result(timeout=60)) == [seen, seen]
    assert attempt.stop_request.asked is not None
    assert attempt.stop_request.asked.reason == "cancel"


def test_request_that_was_replaced_stops_nobody_at_its_end(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def sleep_on() -> None:
        say_ready(tmp_path)
        assert wait_until((tmp_path / "gate").exists, 60)

    run = pair.submit(sleep_on)
    assert are_ready(tmp_path)
    ask_to_stop(run, "resize", 0.2)
    attempt = ask_to_stop(run, "drain", FAR_S)
    time.sleep(0.5)
    (tmp_path / "gate").touch()
    run.result(timeout=60)
    assert attempt._stopping.order is None


def test_function_that_does_not_look_gets_sigterm_after_the_time(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def sleep_on() -> None:
        say_ready(tmp_path)
        time.sleep(1000)

    run = pair.submit(sleep_on)
    assert are_ready(tmp_path)
    attempt = ask_to_stop(run, "drain", 0.2)
    with soon():
        run.wait()
    assert attempt.failures is None
    assert set(attempt._stopped) == {0, 1}
    assert attempt.stop_request.seen_by == set()


def test_rank_that_returns_in_time_is_not_among_the_stopped(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def return_on_rank_0() -> None:
        say_ready(tmp_path)
        while os.environ["RANK"] == "1" or trx.context().stop_asked is None:
            time.sleep(0.01)

    run = pair.submit(return_on_rank_0)
    assert are_ready(tmp_path)
    attempt = ask_to_stop(run, "drain", 2)
    run.wait()
    assert attempt.failures is None
    assert set(attempt._stopped) == {1}
    assert attempt.stop_request.seen_by == {0}


def test_function_that_ignores_both_is_killed(
    pair: trx.Launcher, start_method: StartMethod, tmp_path: Path
) -> None:
    def ignore_all() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say_ready(tmp_path)
        time.sleep(1000)

    run = replace(pair, shutdown_timeout=0.3, start_method=start_method).submit(ignore_all)
    assert are_ready(tmp_path)
    attempt = ask_to_stop(run, "drain", 0.2)
    with soon():
        run.wait()
    assert attempt.failures is None
    assert set(attempt._stopped) == {0, 1}
    assert not any(is_alive(int(path.read_text())) for path in tmp_path.iterdir())


def test_function_that_raises_after_it_was_asked_has_failed(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def raise_when_asked() -> None:
        stop_when_asked(tmp_path)
        raise ValueError("asked")

    run = pair.submit(raise_when_asked)
    assert are_ready(tmp_path)
    attempt = ask_to_stop(run, "drain", FAR_S)
    with pytest.raises(ValueError, match="asked"):
        run.result(timeout=60)
    assert attempt.failures is not None


def test_cancel_asks_before_it_signals(
    pair: trx.Launcher, start_method: StartMethod, tmp_path: Path
) -> None:
    def note_request_at_sigterm() -> None:
        def look(*_: object) -> None:
            note(tmp_path / f"seen {os.environ['RANK']}", repr(trx.context().stop_asked))
            os._exit(0)

        signal.signal(signal.SIGTERM, look)
        say_ready(tmp_path)
        time.sleep(1000)

    run = replace(pair, start_method=start_method).submit(note_request_at_sigterm)
    assert are_ready(tmp_path)
    cancelled_at = time.time()
    run.cancel()
    with soon(), pytest.raises(CancelledError):
        run.result(timeout=60)
    for path in tmp_path.glob("seen *"):
        asked = eval(path.read_text(), {"StopAsked": trx.StopAsked})
        assert asked.reason == "cancel"
        assert cancelled_at + FAR_S <= asked.deadline <= time.time() + FAR_S
    assert len(list(tmp_path.glob("seen *"))) == 2


def test_order_to_stop_has_the_request_with_it(
    pair: trx.Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may deliver the request after the order."""

    async def never(*_: object) -> None:
        pass

    monkeypatch.setattr("torchrunx_ray.driver.running.share.Share._tell_to_ask", never)
    test_cancel_asks_before_it_signals(pair, "fork", tmp_path)


def test_request_before_the_function_is_called_is_seen(
    pair: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = Attempt.go

    async def ask_and_go(attempt: Attempt, call: Any) -> None:
        attempt.ask_to_stop("drain", FAR_S)
        await go(attempt, call)

    def look() -> str | None:
        asked = trx.context().stop_asked
        return asked and asked.reason

    monkeypatch.setattr(Attempt, "go", ask_and_go)
    assert list(pair.run(look)) == ["drain", "drain"]


def test_all_hosts_are_asked(pair: trx.Launcher, tmp_path: Path) -> None:
    launcher = replace(pair, hostnames=2, workers_per_host=1, placement_strategy="PACK")
    run = launcher.submit(stop_when_asked, tmp_path)
    assert are_ready(tmp_path)
    ask_to_stop(run, "drain", FAR_S)
    assert [asked.reason for asked, _ in run.result(timeout=60)] == ["drain", "drain"]


def test_request_belongs_to_its_attempt(pair: trx.Launcher, tmp_path: Path) -> None:
    def fail_when_asked() -> trx.StopAsked | None:
        if trx.context().attempt == 0:
            stop_when_asked(tmp_path)
            raise ValueError
        return trx.context().stop_asked

    run = replace(pair, max_restarts=1).submit(fail_when_asked)
    assert are_ready(tmp_path)
    attempt = ask_to_stop(run, "drain", FAR_S)
    assert list(run.result(timeout=60)) == [None, None]
    attempt.ask_to_stop("cancel", 0)  # the attempt is over, and nobody is told
    assert attempt.stop_request.asked is not None
    assert attempt.stop_request.asked.reason == "drain"


def never(_: BaseException) -> bool:
    raise AssertionError("restart_if was asked about a consequence of the stop")


def test_exception_of_a_function_that_was_asked_to_stop_counts_and_is_asked_about(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def raise_when_asked() -> int:
        if trx.context().attempt == 0:
            stop_when_asked(tmp_path)
            if os.environ["RANK"] == "1":
                raise ValueError("while it saved")
        return trx.context().restarts

    asked: list[BaseException] = []
    restart_if = lambda error: not asked.append(error)  # noqa: E731
    run = replace(pair, max_restarts=1, restart_if=restart_if).submit(raise_when_asked)
    assert are_ready(tmp_path)
    ask_to_stop(run, "drain", FAR_S)
    assert list(run.result(timeout=60)) == [1, 1]
    assert [(type(each), each.args) for each in asked] == [(ValueError, ("while it saved",))]
    assert [each.why for each in run.attempts] == ["failed", "returned"]


def test_exception_of_a_worker_that_got_sigterm_does_not_count(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def raise_at_sigterm() -> int:
        def stop(*_: object) -> None:
            raise ValueError("SIGTERM")

        if trx.context().attempt == 0:
            signal.signal(signal.SIGTERM, stop)
            say_ready(tmp_path)
            time.sleep(1000)
        return trx.context().restarts

    run = replace(pair, max_restarts=1, restart_if=never).submit(raise_at_sigterm)
    assert are_ready(tmp_path)
    ask_to_stop(run, "drain", 0.2)
    assert list(run.result(timeout=60)) == [0, 0]
    assert [each.why for each in run.attempts] == ["drained", "returned"]


def test_errors_of_peers_that_were_left_alone_do_not_count(
    pair: trx.Launcher, tmp_path: Path
) -> None:
    def leave_alone() -> int:
        if trx.context().attempt == 0:
            if os.environ["RANK"] == "0":
                stop_when_asked(tmp_path)
            else:
                say_ready(tmp_path)
                dist.barrier()
        return trx.context().restarts

    run = replace(pair, backend="gloo", max_restarts=1, restart_if=never).submit(leave_alone)
    assert are_ready(tmp_path)
    ask_to_stop(run, "drain", FAR_S)
    assert list(run.result(timeout=60)) == [0, 0]
    assert [each.why for each in run.attempts] == ["drained", "returned"]


def test_worker_that_is_killed_after_the_request_counts(pair: trx.Launcher, tmp_path: Path) -> None:
    def wait() -> int:
        if trx.context().attempt == 0:
            say_ready(tmp_path)
            time.sleep(1000)
        return trx.context().restarts

    run = replace(pair, max_restarts=1, shutdown_timeout=30).submit(wait)
    assert are_ready(tmp_path)
    ask_to_stop(run, "drain", FAR_S)
    os.kill(int((tmp_path / "ready 1").read_text()), signal.SIGKILL)
    assert list(run.result(timeout=60)) == [1, 1]
    assert [each.why for each in run.attempts] == ["failed", "returned"]


def test_look_costs_less_than_a_microsecond(pair: trx.Launcher, tmp_path: Path) -> None:
    def cost(statement: str) -> float:
        names, number = {"trx": trx, "nothing": lambda: None}, 10_000
        return min(timeit.repeat(statement, globals=names, number=number, repeat=20)) / number

    def measure() -> tuple[float, float, float]:
        unset_s = cost("trx.context().stop_asked")
        stop_when_asked(tmp_path)
        return unset_s, cost("trx.context().stop_asked"), cost("nothing()")

    run = pair.submit(measure)
    assert are_ready(tmp_path)
    ask_to_stop(run, "drain", FAR_S)
    for unset_s, isset_s, call_s in run.result(timeout=120):
        print(
            f"{unset_s * 1e9:.0f} ns, {isset_s * 1e9:.0f} ns once it is set; a call: {call_s * 1e9:.0f}"
        )
        most_s = 1e-6 * max(1, call_s / 60e-9)  # where Python itself is slow, so is a look
        assert unset_s < most_s
        assert isset_s < most_s


def test_look_makes_no_system_call(pair: trx.Launcher, tmp_path: Path) -> None:
    """Only functions in C could make one."""

    def look() -> list[str]:
        called: list[str] = []

        def note_call(_frame: object, event: str, what: object) -> None:
            if event == "c_call":
                called.append(repr(what))

        stop_when_asked(tmp_path)
        sys.setprofile(note_call)
        _ = trx.context().stop_asked
        sys.setprofile(None)
        return called

    run = pair.submit(look)
    assert are_ready(tmp_path)
    ask_to_stop(run, "drain", FAR_S)
    assert list(run.result(timeout=60)) == [["<built-in function setprofile>"]] * 2


SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
os.environ.pop("LD_PRELOAD")  # the clock of the workers is right
import torchrunx_ray as trx
from tests.asking import ask_to_stop

def wait(folder):
    (folder / "ready").touch()
    while trx.context().stop_asked is None:
        time.sleep(0.01)
    return trx.context().stop_asked.deadline - time.time(), time.time()

if __name__ == "__main__":
    folder = Path.cwd()
    run = trx.Launcher(backend=None, workers_per_host=1).submit(wait, folder)
    while not (folder / "ready").exists():
        time.sleep(0.01)
    ask_to_stop(run, "drain", 100)
    left_s, theirs = run.result().rank(0)
    print(left_s, theirs - time.time())
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(compiler() is None, reason="needs a C compiler for a clock that is wrong")
def test_deadline_is_on_the_clock_of_the_host(
    run_script: RunScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in shifted_clock(-5000, tmp_path).items():
        monkeypatch.setenv(name, value)
    done = run_script(SCRIPT.format(root=str(Path(__file__).parents[1])))

    assert done.returncode == 0, done.stderr
    left_s, ahead_s = map(float, done.stdout.split()[-2:])
    assert 4900 < ahead_s < 5100
    assert 0 < left_s <= 100


@pytest.mark.parametrize("attempts", [15, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_many_attempts_leave_no_descriptor_and_no_mapping(
    cluster: None, attempts: int, tmp_path: Path
) -> None:
    def fail_often(last: int) -> int:
        if trx.context().attempt < last:
            raise ValueError
        return agent_pid()

    def held(pid: int) -> tuple[int, int]:
        maps = Path(f"/proc/{pid}/maps").read_text()
        return len(os.listdir(f"/proc/{pid}/fd")), maps.count("torchrunx_ray_stop")

    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=attempts)
    with launcher.session() as session:
        (agent,) = session.run(fail_often, 1)
        before = held(agent)
        assert list(session.run(fail_often, attempts)) == [agent]
        after = held(agent)
    assert after[0] <= before[0] + 2
    assert after[1] == before[1] == 0


def test_worker_can_only_read_the_page(pair: trx.Launcher, start_method: StartMethod) -> None:
    def look() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line.split()[1] for line in lines if "torchrunx_ray_stop" in line]

    result = replace(pair, start_method=start_method).run(look)
    assert list(result) == [["r--s"], ["r--s"]]


def test_context_is_unknown_to_a_process_that_the_function_forks(pair: trx.Launcher) -> None:
    def fork() -> int:
        trx.context()
        pid = os.fork()
        if pid == 0:
            try:
                trx.context()
            except RuntimeError as error:
                os._exit(7 if "outside of a worker" in str(error) else 1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert list(pair.run(fork)) == [7, 7]


def test_context_that_has_left_its_worker_knows_no_request(pair: trx.Launcher) -> None:
    def get() -> trx.Context:
        return trx.context()

    context = pickle.loads(pickle.dumps(pair.run(get).rank(1)))
    assert context.rank == 1
    with pytest.raises(RuntimeError, match="only in the worker"):
        _ = context.stop_asked
