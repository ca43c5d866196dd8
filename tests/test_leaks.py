"""Arguments and values go when nobody uses them any more."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
import weakref
from concurrent.futures import CancelledError
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest
import torch

import torchrunx_ray as trx
from tests import processes
from tests.memory import MIB, megabytes, shared_memory, status
from tests.traces import objects_in_store
from torchrunx_ray.driver.background.own_lines import OwnLines
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.together import all_or_first_error


class _OwnError(Exception):
    """An error that can be weakly referenced."""


@pytest.mark.parametrize("others", [(), ("fail",), ("wait",)], ids=" and ".join)
def test_error_of_work_that_is_done_together_goes_without_python_collecting_garbage(
    others: tuple[str, ...],
) -> None:
    """The last task of the list, and so its error, stayed in the frame that raised the error."""

    async def work(what: str) -> None:
        await asyncio.sleep(60 if what == "wait" else 0)
        raise _OwnError

    async def error() -> "weakref.ref[BaseException]":
        try:
            await all_or_first_error([work(what) for what in (*others, "fail")])
        except _OwnError as raised:
            return weakref.ref(raised)
        raise AssertionError

    async def is_gone() -> bool:
        raised = await error()
        for _ in range(10):  # the loop lets go of the tasks that have ended
            await asyncio.sleep(0)
        return raised() is None

    gc.disable()
    try:
        assert asyncio.run(is_gone())
    finally:
        gc.enable()


def test_session_does_not_keep_the_values_of_its_runs(cluster: None) -> None:
    """It held every run, and so every value, until it was closed."""
    with trx.Launcher(workers_per_host=1).session() as session:
        result = weakref.ref(session.run(os.getpid))
        # The driver's thread lets go of it a moment after the caller has it.
        assert processes.wait_until(lambda: (gc.collect(), result())[1] is None, 10)


def test_failed_run_leaves_nothing_to_the_event_loop(one: trx.Launcher, tmp_path: Path) -> None:
    """A timer for a host's last words held all that there was of the run."""

    def fail() -> None:
        processes.wait_until((tmp_path / "gate").exists)
        raise ZeroDivisionError

    run: Any = one.submit(fail)
    assert processes.wait_until(lambda: run._progress.supervisor is not None)
    attempt = weakref.ref(run._progress.supervisor._steps.attempt)
    (tmp_path / "gate").touch()
    with pytest.raises(ZeroDivisionError):
        run.result()
    assert processes.wait_until(lambda: (gc.collect(), attempt())[1] is None, 10)


@pytest.mark.unconfigured_logging
def test_last_log_line_keeps_nothing_of_what_it_was_about() -> None:
    """The error of a failed start kept the run, and so its arguments, until the next line."""
    lines, keeping = OwnLines(), BufferingHandler(100)  # as handlers do that group or send records
    logging.getLogger("torchrunx_ray").addHandler(keeping)
    lines.divert_this_thread()
    try:
        error = _OwnError()
        logging.getLogger("torchrunx_ray").warning("%s", error)
        lines.wait_until_written()
        kept = weakref.ref(error)
        del error
        assert processes.wait_until(lambda: kept() is None, 10)
        assert len(keeping.buffer) == 1
    finally:
        logging.getLogger("torchrunx_ray").removeHandler(keeping)
        lines.forget()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["return", "raise", "agent", "cancel", "restart"])
def test_what_ended_leaves_rays_store_before_python_collects_garbage(
    cluster: None, how: str, tmp_path: Path
) -> None:
    """Reference cycles kept arguments (killed agent, cancelled run), and values (in a session, with restarts)."""

    def end(large: torch.Tensor) -> torch.Tensor:
        processes.note(tmp_path / str(os.getpid()), "")
        if how == "restart":
            if trx.context().attempt == 0:
                raise ValueError
            return large
        if how == "raise":
            raise ValueError
        if how == "agent":
            os.kill(processes.agent_pid(), signal.SIGKILL)
        while how != "return":
            time.sleep(0.01)
        return large

    max_restarts = 1 if how == "restart" else 0
    with trx.Launcher(workers_per_host=1, max_restarts=max_restarts).session() as session:
        gc.collect()  # what other tests left
        before = objects_in_store()
        gc.disable()
        try:
            run = session.submit(end, torch.zeros(2**20))
            assert processes.wait_until(lambda: any(tmp_path.iterdir()), 30)
            if how == "cancel":
                run.cancel()
            with contextlib.suppress(ValueError, trx.AgentFailedError, CancelledError):
                run.result(timeout=30)
            del run
            assert processes.wait_until(lambda: objects_in_store() <= before)
            assert processes.wait_until(lambda: not any(map(is_attempt, gc.get_objects())), 10)
        finally:
            gc.enable()


def is_attempt(each: object) -> bool:
    return type(each) is Attempt


@pytest.mark.slow
@pytest.mark.parametrize("launches", [30, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_nothing_of_many_launches_stays(cluster: None, launches: int) -> None:
    launcher = trx.Launcher(workers_per_host=2, backend=None)

    def go(tensor: torch.Tensor, fail: bool) -> tuple[int, torch.Tensor]:
        if fail and os.environ["RANK"] == "1":
            raise KeyError
        return processes.agent_pid(), tensor

    def look(agent: int) -> tuple[int, int, int, list[str]]:
        files = sorted(name for name in os.listdir("/dev/shm") if "torch" in name)
        fds = len(os.listdir(f"/proc/{agent}/fd"))
        return shared_memory(), status(agent, "RssAnon"), fds, files

    with launcher.session() as session:

        def some_launches(count: int) -> int:
            agent = 0
            for i in range(count):
                if i % 5 == 4:
                    with pytest.raises(KeyError):
                        session.run(go, megabytes(5), True)
                else:
                    result = session.run(go, megabytes(5), False)
                    agent = result.rank(0)[0] if i % 5 == 0 else agent
            return agent

        agent = some_launches(20)
        shmem, anon, fds, files = look(agent)
        assert some_launches(launches) == agent

        # The agent removes the last run's error files a moment after the run has ended.
        assert processes.wait_until(lambda: look(agent)[2] <= fds + 2, 10)
        after = look(agent)
        assert after[0] - shmem < 300 * MIB, "of 1500 MiB that were moved"
        assert after[1] - anon < 30 * MIB
        assert after[3] == files


def test_what_found_no_room_leaves_rays_store_before_python_collects_garbage(cluster: None) -> None:
    """A loop that tries again filled the store with its arguments."""
    launcher = trx.Launcher(workers_per_host=1, cpus_per_worker=1000)
    gc.collect()
    before = objects_in_store()
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(trx.PlacementError):
                launcher.run(len, torch.zeros(2**20))
        assert processes.wait_until(lambda: objects_in_store() <= before)
    finally:
        gc.enable()
