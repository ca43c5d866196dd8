"""A value on its way out of a worker, while something else happens to that worker."""

import os
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchrunx_ray as trx
from tests import processes
from tests.test_data_plane import MIB, status
from torchrunx_ray.wire.channel import Channel


def returns_and_is_killed(folder: Path) -> torch.Tensor:
    (folder / str(os.getpid())).touch()
    return torch.zeros(2**30, dtype=torch.uint8)


@pytest.mark.slow
def test_worker_that_is_killed_while_its_value_is_copied(cluster: None, tmp_path: Path) -> None:
    """Its memory, and what the agent had of it, were held on; the next run was told of an error."""
    killed = 0
    with trx.Launcher(workers_per_host=1, backend=None).session() as session:
        agent = session.run(processes.agent_pid).rank(0)
        before = status(agent, "RssAnon")
        for wait_s in (0, 0.1, 0.2):
            folder = tmp_path / str(wait_s)
            folder.mkdir()
            run = session.submit(returns_and_is_killed, folder)
            while "is being copied" not in str(run.stacks()):
                if run.done():  # on a busy machine nobody may have looked in time
                    break
            (worker,) = folder.iterdir()
            time.sleep(wait_s)
            try:
                os.kill(int(worker.name), signal.SIGKILL)
                run.result()
            except ProcessLookupError:
                pass  # it had ended already
            except trx.WorkerFailedError:
                killed += 1
            run.wait()
            assert processes.wait_until(lambda: status(agent, "RssAnon") - before < 50 * MIB)
            assert session.run(processes.agent_pid).rank(0) == agent
    assert killed


class DeadlineError(Exception):
    pass


class RingsAfter:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> Any:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return int, ()


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.01, 0.05, 0.1, 0.2])
def test_signal_handler_that_raises_while_the_value_is_copied_is_heard(
    launcher: trx.Launcher, wait_s: float, tmp_path: Path
) -> None:
    def return_late() -> Any:
        def ring(_signum: int, frame: types.FrameType | None) -> None:
            called = {frame.f_code.co_name for frame, _ in traceback.walk_stack(frame)}
            if "report_value" in called:
                (tmp_path / "rang").touch()
            raise DeadlineError

        if os.environ["RANK"] == "1":
            return None
        signal.signal(signal.SIGALRM, ring)
        return RingsAfter(wait_s), torch.zeros(2**30, dtype=torch.uint8)

    try:
        _, value = launcher.run(return_late).rank(0)
    except DeadlineError:
        assert (tmp_path / "rang").exists()
    else:  # it rang when the value was delivered
        assert not (tmp_path / "rang").exists()
        assert not value.any()


def test_worker_that_dies_with_its_value_taken_is_not_the_agents_failure(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    """It left the agent's last message unread, which looked like a failure of the agent."""

    def return_and_stop() -> int:
        receive = Channel.receive

        def stop_and_receive(channel: Channel) -> Any:
            os.kill(os.getpid(), signal.SIGSTOP)
            return receive(channel)

        if os.environ["RANK"] == "1":
            return 0
        Channel.receive = stop_and_receive  # of what it receives, the agent's answer comes next
        processes.note(tmp_path / "pid", os.getpid())
        return 7

    run = launcher.submit(return_and_stop)
    assert processes.wait_until((tmp_path / "pid").exists, 30)
    worker = int((tmp_path / "pid").read_text())
    assert processes.wait_until(lambda: is_stopped(worker), 30)
    time.sleep(0.5)  # for the agent's answer
    os.kill(worker, signal.SIGKILL)
    try:
        values = list(run.result())
    except trx.WorkerFailedError as error:
        values = [str(error)]
    assert values == [7, 0] or "was killed by SIGKILL" in values[0]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


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
