"""Processes that a worker starts: none of them outlives it, and none is taken for it."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests import processes
from tests.soon import raised_soon


@pytest.mark.slow
def test_data_loader_children_do_not_delay_the_report_of_a_death(launcher: trx.Launcher) -> None:
    """A child of the worker holds its socket and pipes: their EOF would come when it ends."""

    def leave_a_child_and_die() -> None:
        subprocess.Popen(["sleep", "1000"])
        if os.fork() == 0:
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)

    launcher.run(os.getpid)
    raised_soon(trx.WorkerFailedError, launcher.run, leave_a_child_and_die)


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


@pytest.mark.parametrize("outcome", ["return", "raise", "kill"])
def test_nothing_is_left_of_a_launch(cluster: None, outcome: str, tmp_path: Path) -> None:
    def leave_things_behind() -> str:
        subprocess.Popen(["sleep", "1000"])
        processes.daemonise()
        (tmp_path / "mark").write_text(processes.own_mark())
        if outcome == "raise":
            raise ValueError
        if outcome == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    launcher = trx.Launcher(workers_per_host=2, linger=0)
    errors = {"raise": ValueError, "kill": trx.WorkerFailedError}
    with pytest.raises(errors[outcome]) if outcome in errors else contextlib.nullcontext():
        launcher.run(leave_things_behind)

    assert processes.of_pool((tmp_path / "mark").read_text()) == {}


@pytest.mark.slow
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


@pytest.mark.parametrize("how", ["return", "raise", "exit"])
def test_child_that_the_function_forks_does_not_report_as_the_rank(
    launcher: trx.Launcher, how: str
) -> None:
    """A fork that came out of the function ran on as the worker, and its outcome replaced it."""

    def fork() -> str:
        pid = os.fork()
        if pid == 0:
            if how == "raise":
                raise ValueError("of the child")
            if how == "exit":
                raise SystemExit(0)
            return "child"
        os.waitpid(pid, 0)
        return "parent"

    assert list(launcher.run(fork)) == ["parent", "parent"]


def test_function_may_choose_its_start_method(launcher: trx.Launcher) -> None:
    """It could not: ours had been set with force."""

    def choose() -> str | None:
        import multiprocessing

        multiprocessing.set_start_method("spawn")
        return multiprocessing.get_start_method()

    assert list(launcher.run(choose)) == ["spawn", "spawn"]
