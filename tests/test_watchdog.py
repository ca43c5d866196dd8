"""`torch.distributed.elastic.timer.expires` in a worker: the agent's watchdog ends a worker that stays too long."""

import ctypes
import dataclasses
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic import timer

import torchrunx_ray as trx
from tests.clusters.raylets import raylets
from tests.processes import above, is_alive, note, wait_until

FIFO = "TORCHELASTIC_TIMER_FILE"


@pytest.fixture
def watched(cluster: None) -> trx.Launcher:
    variables = {"TORCHELASTIC_ENABLE_FILE_TIMER": "1"}
    return trx.Launcher(workers_per_host=2, backend=None, extra_env_vars=variables)


def at_path(launcher: trx.Launcher, path: Path) -> trx.Launcher:
    variables = {"TORCHELASTIC_ENABLE_FILE_TIMER": "1", FIFO: str(path)}
    return dataclasses.replace(launcher, extra_env_vars=variables)


def raised(launcher: trx.Launcher, hang: Callable[[], object]) -> trx.WorkerFailedError:
    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(hang)
    return caught.value


def test_worker_that_stays_in_a_scope_fails_with_scope_time_and_line(watched: trx.Launcher) -> None:
    def train() -> None:
        if os.environ["RANK"] == "1":
            with timer.expires(after=0.5, scope="step"):
                time.sleep(1000)
        signal.pause()

    error = raised(watched, train)

    assert (error.rank, error.signal) == (1, signal.SIGKILL)
    assert error.expired_scope is not None
    assert error.expired_scope.name == "step"
    assert 0 < error.expired_scope.seconds <= 0.5
    assert error.expired_scope.pid == error.pid
    said = r"has not left the scope step in 0\.\d+ s, so the watchdog sent SIGKILL\n"
    assert re.search(said, str(error))
    assert "At the deadline it was in train (test_watchdog.py:" in str(error)
    assert "rank 0: train (test_watchdog.py:" in error.stacks


def test_scope_that_is_left_in_time_ends_nobody(watched: trx.Launcher) -> None:
    def train() -> int:
        for _ in range(20):
            with timer.expires(after=3):
                time.sleep(0.01)
        time.sleep(3.5)
        return 7

    assert list(watched.run(train)) == [7, 7]


def test_scope_works_in_threads(watched: trx.Launcher) -> None:
    def train() -> None:
        def hang() -> None:
            with timer.expires(after=0.2, scope="of a thread"):
                time.sleep(1000)

        thread = threading.Thread(target=hang)
        thread.start()
        thread.join()

    error = raised(watched, train)

    assert error.expired_scope is not None
    assert error.expired_scope.name == "of a thread"
    assert "\n  a thread: hang (test_watchdog.py:" in str(error)
    assert "in hang\n" in error.expired_scope.stacks


@pytest.mark.parametrize("leaves_parent", [False, True])
def test_scope_of_a_child_process_fails_its_rank(
    watched: trx.Launcher, leaves_parent: bool
) -> None:
    def train() -> None:
        if os.environ["RANK"] == "1":
            child = os.fork()
            if child == 0 and leaves_parent and os.fork() != 0:
                os._exit(0)
            if child == 0:
                with timer.expires(after=0.4, scope="of a child"):
                    time.sleep(1000)
        signal.pause()

    error = raised(watched, train)

    assert error.rank == 1
    assert error.expired_scope is not None
    assert error.expired_scope.pid != error.pid
    assert f"(entered by its child process {error.expired_scope.pid})" in str(error)


@pytest.mark.slow
def test_torchs_own_client_works_by_path_in_a_script_of_the_function(watched: trx.Launcher) -> None:
    script = """
import os, time
from torch.distributed.elastic import timer
client = timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"])
with timer.expires(after=0.2, scope="of a script", client=client):
    time.sleep(1000)
"""

    def train() -> None:
        if os.environ["RANK"] == "1":
            subprocess.run([sys.executable, "-c", script])
        signal.pause()

    error = raised(watched, train)

    assert error.rank == 1
    assert error.expired_scope is not None
    assert error.expired_scope.name == "of a script"


def test_signal_is_the_one_that_the_client_asks_for_and_only_for_its_process(
    watched: trx.Launcher, tmp_path: Path
) -> None:
    def train() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        if os.environ["RANK"] == "1":
            client = timer.FileTimerClient(os.environ[FIFO], signal.SIGUSR1)
            client.acquire("step", time.time() + 0.2)
            note(tmp_path / "got", signal.sigwait([signal.SIGUSR1]).name)
            signal.pause()
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.pause()
        note(tmp_path / "pending", signal.SIGUSR1 in signal.sigpending())

    error = raised(dataclasses.replace(watched, shutdown_timeout=1), train)

    assert (error.rank, error.signal) == (1, signal.SIGUSR1)
    assert (tmp_path / "got").read_text() == "SIGUSR1"
    assert (tmp_path / "pending").read_text() == "False"


def test_scope_without_a_signal_is_only_told(
    watched: trx.Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> int:
        client = timer.FileTimerClient(os.environ[FIFO], signal=0)
        with timer.expires(after=0.1, scope="slow step", client=client):
            time.sleep(0.6)
        return 7

    with caplog.at_level(logging.WARNING, "torchrunx_ray"):
        assert list(watched.run(train)) == [7, 7]
    said = r"has not left the scope slow step in 0\.\d+ s, which asks for no signal\n"
    assert re.search(said, caplog.text)
    assert "At the deadline it was in train (test_watchdog.py:" in caplog.text


def test_expired_scope_is_a_failure_that_restarts(watched: trx.Launcher) -> None:
    def train() -> int:
        if trx.context().attempt == 0 and os.environ["RANK"] == "1":
            with timer.expires(after=0.2):
                time.sleep(1000)
        return trx.context().restarts

    result = dataclasses.replace(watched, max_restarts=1).run(train)

    assert list(result) == [1, 1]
    assert "has not left the scope" in str(result.attempts[0].failure)


def test_scopes_nest_and_recur_as_torch_defines(watched: trx.Launcher) -> None:
    def train() -> str:
        with timer.expires(after=1000, scope="outer"):
            with timer.expires(after=1000, scope="inner"):
                pass
            with timer.expires(after=2, scope="recursive"):
                with timer.expires(after=2, scope="recursive"):
                    pass
                time.sleep(2.5)  # out of the scope since it was first left
            with timer.expires(after=2, scope="again"):
                client = timer.FileTimerClient(os.environ[FIFO])
                client.acquire("again", time.time() + 1000)  # the later deadline counts
                time.sleep(2.5)
        return "alive"

    assert list(watched.run(train)) == ["alive", "alive"]


def test_of_several_expired_scopes_the_first_with_a_signal_counts(watched: trx.Launcher) -> None:
    def train() -> None:
        if os.environ["RANK"] == "1":
            lines = "".join(
                json.dumps(
                    {
                        "version": 1,
                        "pid": os.getpid(),
                        "scope_id": name,
                        "expiration_time": 1 + after,
                        "signal": number,
                    }
                )
                + "\n"
                for after, name, number in ((0, "told", 0), (2, "later", 9), (1, "first", 15))
            )
            Path(os.environ[FIFO]).write_text(lines)
        signal.pause()

    error = raised(watched, train)

    assert error.expired_scope is not None
    assert (error.expired_scope.name, error.signal) == ("first", signal.SIGTERM)


def test_malformed_partial_and_foreign_lines_lose_nothing_and_kill_nobody(
    watched: trx.Launcher,
) -> None:
    victim = subprocess.Popen(["sleep", "1000"])
    foreign = [victim.pid, os.getpid(), os.getppid(), 1, 0, -1, 2**70]
    huge = b'{"version": 1, "pid": 1, "scope_id": "", "expiration_time": 1' + b"0" * 400

    def line(pid: int, scope: str, expires_at: float) -> bytes:
        fields = {"version": 1, "pid": pid, "scope_id": scope}
        return json.dumps(fields | {"expiration_time": expires_at, "signal": 9}).encode()

    def train() -> None:
        path = Path(os.environ[FIFO])
        if os.environ["RANK"] == "1":
            for pid in foreign:
                path.write_bytes(line(pid, "foreign", 1) + b"\n")
            path.write_bytes(huge + b', "signal": 9}\n')
            path.write_bytes(b"\xff\xfe\n\n{}\n[1]\n" + b"{" * 3000 + b"\n" + b"x" * 200_000)
            path.write_bytes(b"\n" + b'{"version": 1, "pid": 12, "sc')  # its writer is killed here
            path.write_bytes(line(os.getpid(), "mine { } \u00e9", time.time() + 0.3) + b"\n")
            time.sleep(1000)
        signal.pause()

    error = raised(watched, train)

    assert error.rank == 1
    assert error.expired_scope is not None
    assert error.expired_scope.name == "mine { } \u00e9"
    assert error.expired_scope.seconds == pytest.approx(0.3, abs=0.2)
    assert victim.poll() is None
    victim.kill()
    victim.wait()


@pytest.mark.slow
def test_thousand_scopes_in_a_second_are_all_heard(watched: trx.Launcher) -> None:
    def train() -> str:
        for i in range(1000):
            with timer.expires(after=3, scope=f"step {i}"):
                pass
        time.sleep(3.5)
        return "alive"

    assert list(watched.run(train)) == ["alive", "alive"]

    def hang() -> None:
        client = timer.FileTimerClient(os.environ[FIFO])
        for i in range(1000):
            client.acquire(f"step {i}", time.time() + 1000 * (i != 500))
        time.sleep(1000)

    error = raised(watched, hang)
    assert error.expired_scope is not None
    assert error.expired_scope.name == "step 500"


def test_client_that_dies_with_the_fifo_open_harms_nobody(watched: trx.Launcher) -> None:
    def train() -> int:
        path = os.environ[FIFO]
        for _ in range(20):
            code = f"file = open({path!r}, 'w'); print(flush=True); input()"
            child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()
            child.kill()
            child.communicate()
        with timer.expires(after=30):
            pass
        return 7

    assert list(watched.run(train)) == [7, 7]


def test_worker_that_holds_the_gil_in_c_is_told_of_its_line(watched: trx.Launcher) -> None:
    def park() -> None:
        nothing_comes, _ours = os.pipe()
        ctypes.PyDLL(None).read(nothing_comes, ctypes.create_string_buffer(1), 1)

    def train() -> None:
        if os.environ["RANK"] == "1":
            with timer.expires(after=0.3, scope="collective"):
                park()
        signal.pause()

    error = raised(watched, train)

    assert error.rank == 1
    assert "At the deadline it was in park (test_watchdog.py:" in str(error)


def test_agent_outlives_the_workers_that_it_ends(watched: trx.Launcher) -> None:
    def agent() -> int:
        return above(os.getpid())["agent"]

    def hang() -> None:
        with timer.expires(after=0.1):
            time.sleep(1000)

    before = watched.run(agent).rank(0)
    raised(watched, hang)
    assert watched.run(agent).rank(0) == before


def test_without_the_variable_there_is_no_watchdog(cluster: None) -> None:
    def train() -> str | None:
        with pytest.raises(RuntimeError, match="Configure timer client"), timer.expires(after=1):
            pass
        return os.environ.get(FIFO)

    assert trx.Launcher(workers_per_host=1, backend=None).run(train).rank(0) is None


@pytest.mark.parametrize("linger", [0, 60])
def test_fixed_path_is_used_and_removed_after_the_run(
    watched: trx.Launcher, tmp_path: Path, linger: float
) -> None:
    path = tmp_path / "timer"

    def train() -> tuple[str, bool]:
        with timer.expires(after=30):
            return os.environ[FIFO], stat.S_ISFIFO(path.stat().st_mode)

    launcher = dataclasses.replace(at_path(watched, path), linger=linger)
    assert set(launcher.run(train)) == {(str(path), True)}
    assert wait_until(lambda: not path.exists())


def test_path_that_is_no_fifo_is_refused_and_left_alone(
    watched: trx.Launcher, tmp_path: Path
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")

    with pytest.raises(trx.LaunchError, match=r"notes\.txt, leads to something else") as caught:
        at_path(watched, path).run(os.getpid)

    assert type(caught.value) is trx.LaunchError
    assert path.read_text() == "mine"


def test_fifo_that_torchs_own_watchdog_reads_is_refused_and_left(
    watched: trx.Launcher, tmp_path: Path
) -> None:
    path = tmp_path / "timer"
    server = timer.FileTimerServer(str(path), "of torch", max_interval=0.1)
    server.start()
    try:
        launcher = dataclasses.replace(at_path(watched, path), linger=0)
        with pytest.raises(trx.LaunchError, match="another agent or program on this node reads"):
            launcher.run(os.getpid)
        assert stat.S_ISFIFO(path.stat().st_mode)
    finally:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        server.stop()


def test_missing_folder_is_refused(watched: trx.Launcher, tmp_path: Path) -> None:
    with pytest.raises(trx.LaunchError, match=r"cannot be made \(No such file or directory\)"):
        at_path(watched, tmp_path / "missing" / "timer").run(os.getpid)


def test_second_launch_with_the_same_path_is_refused_and_the_first_goes_on(
    watched: trx.Launcher, tmp_path: Path
) -> None:
    launcher = dataclasses.replace(at_path(watched, tmp_path / "timer"), cpus_per_worker=0.1)

    def train() -> str:
        note(tmp_path / f"runs{os.environ['RANK']}", "")
        assert wait_until((tmp_path / "may_end").exists, 100)
        with timer.expires(after=30):
            return "alive"

    first = launcher.submit(train)
    assert wait_until((tmp_path / "runs1").exists, 60)
    with pytest.raises(
        trx.LaunchError, match="another agent or program on this node reads the FIFO"
    ):
        launcher.run(os.getpid)
    (tmp_path / "may_end").touch()
    assert list(first.result(timeout=60)) == ["alive", "alive"]
    assert len(launcher.run(os.getpid)) == 2


def test_killed_agent_leaves_no_fifo(watched: trx.Launcher, tmp_path: Path) -> None:
    path = tmp_path / "timer"

    def train() -> None:
        note(tmp_path / f"pid{os.environ['RANK']}", os.getpid())
        signal.pause()

    run = at_path(watched, path).submit(train)
    assert wait_until((tmp_path / "pid1").exists, 60)
    os.kill(above(int((tmp_path / "pid1").read_text()))["agent"], signal.SIGKILL)
    with pytest.raises(trx.AgentFailedError):
        run.result(timeout=60)

    assert wait_until(lambda: not path.exists())
    assert not is_alive(int((tmp_path / "pid1").read_text()))


@pytest.mark.slow
def test_two_agents_on_one_host_have_watchdogs_of_their_own() -> None:
    def train() -> str:
        if trx.context().attempt == 0 and os.environ["RANK"] == "1":
            with timer.expires(after=0.3):
                time.sleep(1000)
        with timer.expires(after=30):
            return os.environ[FIFO]

    with raylets({"num_cpus": 1}, {"num_cpus": 1}):
        variables = {"TORCHELASTIC_ENABLE_FILE_TIMER": "1"}
        launcher = trx.Launcher(
            hostnames=2, workers_per_host=1, backend=None, extra_env_vars=variables, max_restarts=1
        )
        first, second = launcher.run(train)
    assert first != second


@pytest.mark.parametrize("victim", ["agent", "template"])
def test_fixed_path_serves_the_next_attempt_after_the_death_of(
    watched: trx.Launcher, tmp_path: Path, victim: str
) -> None:
    path = tmp_path / "timer"

    def train() -> str:
        note(tmp_path / f"pid{trx.context().attempt}-{os.environ['RANK']}", os.getpid())
        if trx.context().attempt == 0:
            signal.pause()
        time.sleep(1)  # the keepers of the first attempt have ended
        with timer.expires(after=30):
            return os.environ[FIFO]

    run = dataclasses.replace(at_path(watched, path), max_restarts=1).submit(train)
    assert wait_until((tmp_path / "pid0-1").exists, 60)
    os.kill(above(int((tmp_path / "pid0-1").read_text()))[victim], signal.SIGKILL)

    assert list(run.result(timeout=60)) == [str(path)] * 2
    assert wait_until(lambda: not path.exists())


def test_launch_inside_a_worker_does_not_take_the_outer_timer_file(
    cluster: None, watched: trx.Launcher, tmp_path: Path
) -> None:
    def inner() -> str:
        with timer.expires(after=30):
            return os.environ[FIFO]

    def outer() -> list[str]:
        nested = trx.Launcher(workers_per_host=1, cpus_per_worker=0.1, backend=None)
        return [os.environ[FIFO], nested.run(inner).rank(0)]

    launcher = dataclasses.replace(
        at_path(watched, tmp_path / "timer"), workers_per_host=1, cpus_per_worker=0.1
    )
    first, second = launcher.run(outer).rank(0)

    assert first == str(tmp_path / "timer")
    assert second != first
