"""A value on its way out of a worker, while something else happens to that worker."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchrunx_ray as trx
from tests import processes
from tests.test_data_plane import MIB, status


def returns_and_is_killed(folder: Path) -> torch.Tensor:
    (folder / str(os.getpid())).touch()
    return torch.zeros(2**31, dtype=torch.uint8)


@pytest.mark.slow
def test_worker_that_is_killed_while_its_value_is_copied(cluster: None, tmp_path: Path) -> None:
    """Its memory, and what the agent had of it, were held on; the next run was told of an error."""
    with trx.Launcher(workers_per_host=1, backend=None).session() as session:
        agent = session.run(processes.agent_pid).rank(0)
        before = status(agent, "RssAnon")
        for wait_s in (0.4, 0.5, 0.6, 0.7):
            run = session.submit(returns_and_is_killed, tmp_path / str(wait_s))
            (tmp_path / str(wait_s)).mkdir()
            assert processes.wait_until(lambda: any((tmp_path / str(wait_s)).iterdir()), 30)  # noqa: B023
            (worker,) = (tmp_path / str(wait_s)).iterdir()
            time.sleep(wait_s)
            try:
                os.kill(int(worker.name), signal.SIGKILL)
                run.result()
            except (ProcessLookupError, trx.WorkerFailedError):
                pass  # it had ended already, or is told as what it is
            run.wait()
            assert processes.wait_until(lambda: status(agent, "RssAnon") - before < 50 * MIB)
            assert session.run(processes.agent_pid).rank(0) == agent


class DeadlineError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.2, 0.3, 0.4, 0.5])
def test_signal_handler_that_raises_while_the_value_is_copied_is_heard(
    launcher: trx.Launcher, wait_s: float
) -> None:
    def return_late() -> torch.Tensor:
        def ring(*_: object) -> None:
            raise DeadlineError

        signal.signal(signal.SIGALRM, ring)
        value = torch.zeros(2**30, dtype=torch.uint8)
        signal.setitimer(signal.ITIMER_REAL, wait_s)
        return value

    try:
        value = launcher.run(return_late).rank(0)
    except DeadlineError:
        return
    assert not value.any()


def test_worker_that_dies_with_its_value_taken_is_not_the_agents_failure(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    """It left the agent's last message unread, which looked like a failure of the agent."""

    def return_and_stop() -> int:
        import threading

        def stop_and_be_killed() -> None:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGSTOP)

        if os.environ["RANK"] == "0":
            (tmp_path / str(os.getpid())).touch()
            value = Slow()
            threading.Thread(target=stop_and_be_killed, daemon=True).start()
            return value  # pyright: ignore[reportReturnType]
        return 0

    run = launcher.submit(return_and_stop)
    assert processes.wait_until(lambda: any(tmp_path.iterdir()), 30)
    (worker,) = tmp_path.iterdir()
    assert processes.wait_until(lambda: is_stopped_or_gone(int(worker.name)), 30)
    time.sleep(0.5)
    with contextlib.suppress(
        ProcessLookupError
    ):  # on a busy machine it may have ended before it stopped
        os.kill(int(worker.name), signal.SIGKILL)
    try:
        values = list(run.result())
    except trx.WorkerFailedError as error:
        values = [str(error)]
    assert values == [7, 0] or "was killed by SIGKILL" in values[0]


class Slow:
    def __reduce__(self) -> Any:
        time.sleep(0.29)
        return int, (7,)


def is_stopped_or_gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "T"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may do that to itself")
@pytest.mark.parametrize("how", ["setuid", "chroot"])
def test_process_that_may_not_be_looked_at_returns_its_value(
    launcher: trx.Launcher, how: str, tmp_path: Path
) -> None:
    def hide() -> torch.Tensor:
        os.setuid(65534) if how == "setuid" else os.chroot(tmp_path)
        return torch.arange(10_000_000)

    assert torch.equal(launcher.run(hide).rank(1), torch.arange(10_000_000))


def test_memory_that_cannot_be_read_is_told_of_the_rank(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    def map_and_truncate() -> Any:
        path = tmp_path / os.environ["RANK"]
        array = np.memmap(path, dtype=np.uint8, mode="w+", shape=(10 * MIB,))
        os.truncate(path, 0)
        return np.asarray(array)

    with pytest.raises(OSError, match="Bad address") as caught:
        launcher.run(map_and_truncate)
    assert isinstance(caught.value.__cause__, trx.RemoteFailure)


@pytest.mark.slow
def test_value_is_fetched_by_an_atexit_function(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import atexit, torch
import torchrunx_ray as trx
result = trx.Launcher(workers_per_host=1).run(torch.ones, 10_000_000)
atexit.register(lambda: print("fetched", result.rank(0).sum().item()))
"""
    )
    assert done.stdout == "fetched 10000000.0\n", done.stderr


class Exits:
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (3,)


def test_value_that_exits_when_it_is_unpickled_does_not_end_the_driver(
    launcher: trx.Launcher,
) -> None:
    result = launcher.run(Exits)
    with pytest.raises(trx.PayloadError, match=r"the return value of rank 1 .*SystemExit: 3"):
        result.rank(1)
