"""What the driver raises when something goes wrong, and that nothing is left of the launch."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from tests import processes
from tests.soon import raised_soon


class TwoArguments(Exception):
    """Cannot be unpickled the usual way."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} ({code})")
        self.code = code


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        import threading

        self.lock = threading.Lock()


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
    assert "worker/outcome.py" not in str(cause), "our own frames are left out"
    assert any(f"pid {cause.pid}" in note for note in error.__notes__)


def test_first_failure_is_raised_while_others_wait_in_a_collective(launcher: trx.Launcher) -> None:
    def fail_on_rank_1() -> None:
        if dist.get_rank() == 1:
            raise TwoArguments("first", 1)
        dist.all_reduce(torch.ones(1))

    launcher.run(os.getpid)
    caught = raised_soon(TwoArguments, 2, launcher.run, fail_on_rank_1)

    assert isinstance(caught.value.__cause__, trx.RemoteFailure)
    assert caught.value.__cause__.rank == 1


def test_failure_stops_ranks_that_would_never_return(launcher: trx.Launcher) -> None:
    def fail_or_sleep() -> None:
        if dist.get_rank() == 0:
            raise ValueError("no")
        time.sleep(1000)

    launcher.run(os.getpid)
    caught = raised_soon(ValueError, 2, launcher.run, fail_or_sleep)

    assert caught.value.args == ("no",)
    assert caught.value.__notes__[-1].startswith("Stopped by the launch after that: rank 1 on ")


def test_exception_group_arrives_as_itself(launcher: trx.Launcher) -> None:
    def fail() -> None:
        raise ExceptionGroup("two things", [TwoArguments("one", 1), KeyError("other")])

    with pytest.raises(ExceptionGroup) as caught:
        launcher.run(fail)

    first, second = caught.value.exceptions
    assert (type(first), str(first)) == (TwoArguments, "one (1)")
    assert (type(second), second.args) == (KeyError, ("other",))
    assert isinstance(caught.value.__cause__, trx.RemoteFailure)


def test_equal_failures_are_one_line(cluster: None) -> None:
    def fail() -> None:
        if dist.get_rank() > 0:
            time.sleep(0.05)
        raise ValueError(f"shard {dist.get_rank()}")

    with pytest.raises(ValueError, match="shard 0") as caught:
        trx.Launcher(workers_per_host=4).run(fail)

    (line,) = [note for note in caught.value.__notes__ if " s later, " in note]
    assert {f"rank {rank} on" for rank in (1, 2, 3)} <= set(re.findall(r"rank \d on", line))
    assert isinstance(caught.value.__cause__, trx.RemoteFailure)
    assert len(caught.value.__cause__.failures) == 4


@pytest.mark.parametrize("failure", ["raise", "kill"])
def test_rank_that_is_parked_in_c_and_deaf_neither_delays_nor_survives(
    cluster: None, failure: str, tmp_path: Path
) -> None:
    """As a rank in NCCL whose peer has gone."""

    def fail_or_park() -> None:
        if dist.get_rank() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            nothing_comes, _ours = os.pipe()
            (tmp_path / str(os.getpid())).touch()
            ctypes.PyDLL(None).read(nothing_comes, ctypes.create_string_buffer(1), 1)
        while not any(tmp_path.iterdir()):
            time.sleep(0.01)
        time.sleep(0.1)
        if failure == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise TwoArguments("first", 1)

    launcher = trx.Launcher(workers_per_host=2, shutdown_timeout=1)
    launcher.run(os.getpid)

    def run_anew() -> None:
        for of_last_attempt in tmp_path.iterdir():
            of_last_attempt.unlink()
        launcher.run(fail_or_park)

    caught = raised_soon((TwoArguments, trx.WorkerFailedError), 0.3 + 1 + 1.7, run_anew)

    assert any("rank 0: fail_or_park (test_failures.py:" in note for note in caught.value.__notes__)
    (parked,) = tmp_path.iterdir()
    assert not processes.is_alive(int(parked.name))


def test_exception_that_cannot_be_pickled_is_shown_as_text(launcher: trx.Launcher) -> None:
    def fail() -> None:
        raise Unpicklable

    launcher.run(os.getpid)
    caught = raised_soon(trx.WorkerFailedError, 2, launcher.run, fail)

    message = str(caught.value)
    assert "raised tests.test_failures.Unpicklable: holds a lock" in message
    assert "cannot pickle '_thread.lock'" in message
    assert "raise Unpicklable" in message


@pytest.mark.parametrize(
    ("code", "said"), [(0, None), (None, None), (3, "sys.exit(3)"), ("why", "sys.exit('why')")]
)
def test_sys_exit(launcher: trx.Launcher, code: object, said: str | None) -> None:
    if said is None:
        assert list(launcher.run(sys.exit, code)) == [None, None]
        return
    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(sys.exit, code)
    assert f"called {said}" in str(caught.value)
    assert caught.value.exit_code == (code if isinstance(code, int) else None)


def test_keyboard_interrupt_in_the_function_is_a_worker_failure(launcher: trx.Launcher) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(trx.WorkerFailedError, match="KeyboardInterrupt"):
        launcher.run(interrupt)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_death_by_signal_names_rank_pid_and_signal(
    launcher: trx.Launcher, signum: signal.Signals
) -> None:
    def die() -> None:
        if os.environ["RANK"] == "1":
            print("the last words", file=sys.stderr)
            os.kill(os.getpid(), signum)
        time.sleep(1000)

    launcher.run(os.getpid)
    caught = raised_soon(trx.WorkerFailedError, 2, launcher.run, die)

    error = caught.value
    assert (error.rank, error.local_rank, error.signal, error.exit_code) == (1, 1, signum, None)
    assert f"pid {error.pid}" in str(error)
    assert f"was killed by {signum.name}" in str(error)
    assert "the last words" in error.last_lines
    assert error.peak_memory
    assert error.peak_memory > 10_000_000


@pytest.mark.parametrize("code", [0, 3])
def test_exit_without_an_outcome(launcher: trx.Launcher, code: int) -> None:
    launcher.run(os.getpid)
    caught = raised_soon(trx.WorkerFailedError, 2, launcher.run, os._exit, code)

    assert caught.value.exit_code == code
    assert "before its function returned or raised" in str(caught.value)


def test_data_loader_children_do_not_delay_the_report_of_a_death(launcher: trx.Launcher) -> None:
    """A child of the worker holds its socket and pipes: their EOF would come when it ends."""

    def leave_a_child_and_die() -> None:
        subprocess.Popen(["sleep", "1000"])
        if os.fork() == 0:
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)

    launcher.run(os.getpid)
    raised_soon(trx.WorkerFailedError, 2, launcher.run, leave_a_child_and_die)


def test_children_of_a_worker_end_with_it_while_others_run_on(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    def leave_a_child_or_look_for_it() -> bool | None:
        note = tmp_path / "child"
        if os.environ["RANK"] == "0":
            processes.note(note, subprocess.Popen(["sleep", "1000"]).pid)
            return None
        assert processes.wait_until(note.exists)
        return processes.wait_until(lambda: not processes.is_alive(int(note.read_text())))

    assert launcher.run(leave_a_child_or_look_for_it).rank(1) is True


def daemonise() -> None:
    """Start a process that leaves the worker's group, session and parent."""
    subprocess.run(["setsid", "sh", "-c", "sleep 1000 &"], check=True)


@pytest.mark.parametrize("outcome", ["return", "raise", "kill"])
def test_nothing_is_left_of_a_launch(cluster: None, outcome: str, tmp_path: Path) -> None:
    def leave_things_behind() -> str:
        subprocess.Popen(["sleep", "1000"])
        daemonise()
        (tmp_path / "mark").write_text(processes.own_mark())
        if outcome == "raise":
            raise ValueError
        if outcome == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    launcher = trx.Launcher(workers_per_host=2, linger=0)
    try:
        launcher.run(leave_things_behind)
    except (ValueError, trx.WorkerFailedError):
        assert outcome != "return"

    assert processes.of_pool((tmp_path / "mark").read_text()) == {}


def test_nothing_but_keepers_and_template_lingers_and_not_for_long(cluster: None) -> None:
    def leave_things_behind() -> str:
        daemonise()
        return processes.own_mark()

    mark = trx.Launcher(workers_per_host=2, linger=2).run(leave_things_behind).rank(0)

    assert len(processes.of_pool(mark)) == 3
    assert processes.wait_until(lambda: processes.of_pool(mark) == {}, 5)


def test_semaphores_of_a_killed_pool_do_not_stay(launcher: trx.Launcher) -> None:
    """multiprocessing's resource tracker unlinks them, if it is not killed before."""

    def semaphores() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith("sem.mp-")}

    def make_one_and_die() -> None:
        import multiprocessing

        lock = multiprocessing.get_context("spawn").Lock()
        multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,)).start()
        os.kill(os.getpid(), signal.SIGKILL)
        del lock

    before = semaphores()
    with pytest.raises(trx.WorkerFailedError):
        launcher.run(make_one_and_die)

    assert semaphores() - before == set()


@pytest.mark.parametrize(
    "victims",
    [
        ("outer keeper",),
        ("keeper",),
        ("template",),
        ("agent",),
        ("outer keeper", "keeper"),
        ("keeper", "template"),
        ("outer keeper", "template"),
    ],
    ids="+".join,
)
def test_who_kills_whom(cluster: None, victims: tuple[str, ...], tmp_path: Path) -> None:
    def announce_and_sleep() -> str:
        daemonise()
        pid = os.getpid()
        processes.note(tmp_path / str(pid), processes.own_mark())
        while not (tmp_path / "gate").exists():
            time.sleep(0.01)
        return processes.own_mark()

    run = trx.Launcher(workers_per_host=2, linger=0).submit(announce_and_sleep)
    assert processes.wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    worker = next(tmp_path.iterdir())
    mark = worker.read_text()
    begun = time.monotonic()
    pids = processes.above(int(worker.name))
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)

    if all("keeper" in victim for victim in victims):  # the last line of defence: the run goes on
        (tmp_path / "gate").touch()
        assert run.result(timeout=30).rank(0) == mark
    else:
        with pytest.raises(trx.AgentFailedError) as caught:
            run.result(timeout=30)
        assert victims[-1] in str(caught.value)
        assert time.monotonic() - begun < 2
    assert processes.wait_until(lambda: processes.of_pool(mark) == {}, 2)


@pytest.mark.parametrize("working_s", [0, 0.001, 0.002, 0.004, 0.008])
def test_keeper_that_is_killed_at_its_work(cluster: None, working_s: float, tmp_path: Path) -> None:
    """As Ray does when the raylet dies: the agent ends its template, and its child is killed."""

    def announce_and_sleep() -> None:
        for _ in range(20):
            daemonise()
        processes.note(tmp_path / str(os.getpid()), processes.own_mark())
        time.sleep(1000)

    run = trx.Launcher(workers_per_host=1, linger=0).submit(announce_and_sleep)
    assert processes.wait_until(lambda: list(tmp_path.iterdir()) != [], 30)
    (worker,) = tmp_path.iterdir()
    above = processes.above(int(worker.name))
    mark = worker.read_text()
    os.kill(above["outer keeper"], signal.SIGTERM)
    time.sleep(working_s)
    with contextlib.suppress(ProcessLookupError):  # a slow test; it was done already
        os.kill(above["outer keeper"], signal.SIGKILL)
    os.kill(above["agent"], signal.SIGKILL)

    with pytest.raises(trx.AgentFailedError):
        run.result(timeout=30)
    assert processes.wait_until(lambda: processes.of_pool(mark) == {}, 2)


def test_workers_die_even_when_all_above_them_are_killed_at_once(
    cluster: None, tmp_path: Path
) -> None:
    def announce_and_sleep() -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(1000)

    run = trx.Launcher(workers_per_host=2, linger=0).submit(announce_and_sleep)
    assert processes.wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    for victim in processes.above(workers[0]).values():
        os.kill(victim, signal.SIGKILL)

    with pytest.raises(trx.AgentFailedError):
        run.result(timeout=30)
    assert processes.wait_until(lambda: not any(map(processes.is_alive, workers)), 1)


def test_driver_that_is_killed_leaves_nothing(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import os, signal, subprocess, sys
sys.path.insert(0, os.getcwd())
import torchrunx_ray as trx

def sleep(driver):
    import time
    subprocess.run(["setsid", "sh", "-c", "sleep 1000 &"], check=True)
    print("mark", os.environ["TORCHRUNX_RAY_POOL"], flush=True)
    if os.environ["RANK"] == "0":
        time.sleep(1)
        os.kill(driver, signal.SIGKILL)
    time.sleep(1000)

trx.launch(sleep, (os.getpid(),), workers_per_host=2)
"""
    )

    assert done.returncode == -signal.SIGKILL, done.stderr
    mark = done.stdout.split()[-1]
    assert processes.wait_until(lambda: processes.of_pool(mark) == {}, 5)


def test_ctrl_c_stops_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import ray, time, os
import torchrunx_ray as trx
ray.init(address="local", num_cpus=2, include_dashboard=False)

def sleep():
    print("mark", os.environ["TORCHRUNX_RAY_POOL"], flush=True)
    time.sleep(1000)

try:
    trx.launch(sleep, workers_per_host=1)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    )
    driver = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    mark = driver.stdout.readline().split()[1]
    begun = time.monotonic()
    driver.send_signal(signal.SIGINT)

    assert driver.stdout.readline() == "interrupted\n"
    assert time.monotonic() - begun < 1
    assert driver.wait(30) == 0
    driver.stdout.close()
    assert processes.wait_until(lambda: processes.of_pool(mark) == {}, 2)


def test_session_replaces_a_template_that_was_killed(cluster: None) -> None:
    def kill_template() -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)

    with trx.Launcher(workers_per_host=2).session() as session:
        with pytest.raises(trx.AgentFailedError):
            session.run(kill_template)
        assert list(session.run(lambda: "well")) == ["well", "well"]


@pytest.mark.slow
def test_frozen_agent_is_named_and_the_run_goes_on_when_it_wakes(
    launcher: trx.Launcher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def announce_and_wait() -> str:
        processes.note(tmp_path / os.environ["RANK"], os.getpid())
        while not (tmp_path / "gate").exists():
            time.sleep(0.01)
        return "well"

    run = launcher.submit(announce_and_wait)
    assert processes.wait_until((tmp_path / "1").exists, 30)
    agent = processes.above(int((tmp_path / "1").read_text()))["agent"]
    os.kill(agent, signal.SIGSTOP)
    try:
        assert processes.wait_until(lambda: "has not answered for 15 s" in caplog.text, 25)
    finally:
        os.kill(agent, signal.SIGCONT)
    (tmp_path / "gate").touch()

    assert list(run.result(timeout=30)) == ["well", "well"]


def test_killed_store_is_named(launcher: trx.Launcher) -> None:
    """Collectives would go on, and the next new group would break."""

    def kill_the_store() -> None:
        if os.environ["RANK"] == "0":
            template = os.getppid()
            others = {int(os.environ["RANK"]), os.getpid()}
            for entry in os.listdir("/proc"):
                if entry.isdigit() and int(entry) not in others:
                    is_child = processes.is_alive(int(entry)) and (
                        processes.parent(int(entry)) == template
                    )
                    if is_child and os.getpgid(int(entry)) == os.getpgid(template):
                        os.kill(int(entry), signal.SIGKILL)  # workers lead groups of their own
        time.sleep(1000)

    launcher.run(os.getpid)
    caught = raised_soon(trx.AgentFailedError, 2, launcher.run, kill_the_store)
    assert caught.match(r"serves the store .* was killed by SIGKILL")
    assert list(launcher.run(lambda: "well")) == ["well", "well"]
