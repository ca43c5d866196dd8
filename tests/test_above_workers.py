"""What stands above the workers (agent, keepers, template, store) is killed or frozen."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests import processes
from tests.soon import raised_soon, soon


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(victims, id="+".join(victims), marks=pytest.mark.slow if is_slow else [])
        for victims, is_slow in (
            (("outer keeper",), True),
            (("keeper",), True),
            (("template",), False),
            (("agent",), False),
            (("outer keeper", "keeper"), True),
            (("keeper", "template"), False),
            (("outer keeper", "template"), False),
        )
    ],
)
def test_who_kills_whom(cluster: None, victims: tuple[str, ...], tmp_path: Path) -> None:
    def announce_and_sleep() -> str:
        processes.daemonise()
        pid = os.getpid()
        processes.note(tmp_path / str(pid), processes.own_mark())
        while not (tmp_path / "gate").exists():
            time.sleep(0.01)
        return processes.own_mark()

    run = trx.Launcher(workers_per_host=2, linger=0).submit(announce_and_sleep)
    assert processes.wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    worker = next(tmp_path.iterdir())
    mark = worker.read_text()
    pids = processes.above(int(worker.name))
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)

    if all("keeper" in victim for victim in victims):  # the last line of defence: the run goes on
        (tmp_path / "gate").touch()
        assert run.result(timeout=30).rank(0) == mark
    else:
        with soon(), pytest.raises(trx.AgentFailedError) as caught:
            run.result(timeout=30)
        assert victims[-1] in str(caught.value)
    assert processes.wait_until(lambda: processes.of_pool(mark) == {})


def test_agent_that_is_told_to_end_ends_at_once(cluster: None, tmp_path: Path) -> None:
    """Ray sends SIGTERM where its owner died, and its own handler waits for a poll under way."""

    def announce_and_sleep() -> None:
        processes.note(tmp_path / str(os.getpid()), processes.own_mark())
        time.sleep(1000)

    run = trx.Launcher(workers_per_host=1, linger=0).submit(announce_and_sleep)
    assert processes.wait_until(lambda: list(tmp_path.iterdir()) != [], 30)
    (worker,) = tmp_path.iterdir()
    mark = worker.read_text()
    os.kill(processes.above(int(worker.name))["agent"], signal.SIGTERM)

    # Ray kills an agent that has not ended 5 s after its SIGTERM.
    with soon(4.5), pytest.raises(trx.AgentFailedError, match="the agent died"):
        run.result(timeout=30)
    assert processes.wait_until(lambda: processes.of_pool(mark) == {})


@pytest.mark.slow
@pytest.mark.parametrize("working_s", [0, 0.001, 0.002, 0.004, 0.008])
def test_keeper_that_is_killed_at_its_work(cluster: None, working_s: float, tmp_path: Path) -> None:
    """As Ray does when the raylet dies: the agent ends its template, and its child is killed."""

    def announce_and_sleep() -> None:
        for _ in range(20):
            processes.daemonise()
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
    assert processes.wait_until(lambda: processes.of_pool(mark) == {})


def test_keepers_are_not_in_the_group_that_ray_ends_with_the_agent(launcher: trx.Launcher) -> None:
    """Ray's SIGTERM had it kill the template at its work, and SIGKILL came 0.2 s later.

    Daemons of a worker that took longer to die were left.
    """

    def groups() -> tuple[set[int], int]:
        above = processes.above(os.getpid())
        keepers = above["outer keeper"], above["keeper"]
        return {os.getpgid(pid) for pid in keepers}, above["outer keeper"]

    assert all(groups == {outer} for groups, outer in launcher.run(groups))


def test_keepers_alone_run_before_other_processes(launcher: trx.Launcher) -> None:
    """On a host that wakes up, a worker would run until a keeper has its turn."""
    take = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    if subprocess.run([sys.executable, "-c", take], capture_output=True).returncode != 0:
        pytest.skip("no process here may take a real-time priority")

    def priorities() -> dict[str, tuple[int, int]]:
        pids = {**processes.above(os.getpid()), "worker": os.getpid()}
        del pids["agent"]
        return {
            name: (os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid))
            for name, pid in pids.items()
        }

    first, usual = (os.SCHED_RR | os.SCHED_RESET_ON_FORK, 0), (os.SCHED_OTHER, 0)
    assert launcher.run(priorities).rank(0) == {
        "outer keeper": first,
        "keeper": first,
        "template": usual,
        "worker": usual,
    }


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
    assert processes.wait_until(lambda: not any(map(processes.is_alive, workers)))


def test_template_that_dies_before_the_run_starts_is_a_failure(cluster: None) -> None:
    """The launch "succeeded", with None for every value."""
    with pytest.raises(trx.AgentFailedError, match="the template process"):
        trx.Launcher(workers_per_host=1, extra_env_vars={"PYTHONHOME": "/nowhere"}).run(os.getpid)


def test_killed_store_is_named(launcher: trx.Launcher) -> None:
    """Collectives would go on, and the next new group would break."""

    def kill_the_store() -> None:
        if os.environ["RANK"] == "0":
            template = os.getppid()
            for entry in os.listdir("/proc"):
                if entry.isdigit() and int(entry) != os.getpid():
                    is_child = processes.is_alive(int(entry)) and (
                        processes.parent(int(entry)) == template
                    )
                    if is_child and os.getpgid(int(entry)) == os.getpgid(template):
                        os.kill(int(entry), signal.SIGKILL)  # workers lead groups of their own
        time.sleep(1000)

    launcher.run(os.getpid)
    caught = raised_soon(trx.AgentFailedError, launcher.run, kill_the_store)
    assert caught.match(r"serves the store .* was killed by SIGKILL")
    assert list(launcher.run(lambda: "well")) == ["well", "well"]


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
