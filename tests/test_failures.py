"""The first failure of a rank is the launch's: it is raised soon, and the other ranks are stopped."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from tests import processes
from tests.exceptions import TwoArguments
from tests.soon import raised_soon, soon


def test_death_is_named_rather_than_what_it_did_to_its_peers(cluster: None) -> None:
    """The kernel closes a dying worker's sockets first: its peer's gloo error had the earlier time."""

    def die_or_wait() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with trx.Launcher(workers_per_host=2).session() as session:
        for _ in range(20):
            with pytest.raises(trx.WorkerFailedError) as caught:
                session.run(die_or_wait)
            assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_death_that_is_reported_late_is_still_named(
    launcher: trx.Launcher, how: signal.Signals
) -> None:
    """On a busy machine the template, which reports it, may run long after the peer has failed."""

    def die_under_a_frozen_template() -> None:
        if dist.get_rank() == 1:
            template = os.getppid()
            subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -CONT {template}"])
            os.kill(template, signal.SIGSTOP)
            os.kill(os.getpid(), how)
        dist.barrier()

    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(die_under_a_frozen_template)
    assert (caught.value.rank, caught.value.signal) == (1, how)


def test_exception_is_named_before_what_its_peers_raised_when_it_left_the_group(
    launcher: trx.Launcher,
) -> None:
    """As with `finally: dist.destroy_process_group()`: the peers are told before the exception is out."""

    def leave_and_raise() -> None:
        try:
            dist.barrier()
            if dist.get_rank() == 1:
                raise ValueError("shard 17")
            dist.barrier()
        finally:
            dist.destroy_process_group()
            time.sleep(0.2)  # such as a tracker's last upload

    for _ in range(3):
        with pytest.raises(ValueError, match="shard 17"):
            launcher.run(leave_and_raise)


class TrainError(Exception):
    pass


@pytest.mark.parametrize("how", ["wait", "raise from", "sys.exit"])
def test_death_is_named_before_what_came_of_its_peers_errors(
    launcher: trx.Launcher, how: str
) -> None:
    def die_or_wait() -> None:
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            work = dist.all_reduce(torch.ones(1), async_op=True)
            assert work is not None
            work.wait()  # C++, so that the innermost frame is this one
        except RuntimeError as error:
            if how == "raise from":
                raise TrainError from error
            if how == "sys.exit":
                sys.exit(f"failed: {error}")
            raise

    for _ in range(4):
        with pytest.raises(trx.WorkerFailedError) as caught:
            launcher.run(die_or_wait)
        assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_crash_of_a_rank_that_was_told_to_stop_is_not_taken_for_the_cause(
    launcher: trx.Launcher, how: signal.Signals
) -> None:
    def fail_or_crash_when_stopped() -> None:
        def crash(*_: object) -> None:
            time.sleep(0.5)
            os.kill(os.getpid(), how)

        signal.signal(signal.SIGTERM, crash)
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(1000)
        dist.all_reduce(torch.ones(1, dtype=torch.int16))  # gloo has none of these

    with pytest.raises(RuntimeError, match="scalar type") as caught:
        launcher.run(fail_or_crash_when_stopped)
    assert any(how.name in note for note in caught.value.__notes__)


def test_equal_failures_are_one_line(cluster: None) -> None:
    def fail() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
        if dist.get_rank() > 0:
            time.sleep(1)
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

    caught = raised_soon((TwoArguments, trx.WorkerFailedError), run_anew)

    assert any("rank 0: fail_or_park (test_failures.py:" in note for note in caught.value.__notes__)
    (parked,) = tmp_path.iterdir()
    assert not processes.is_alive(int(parked.name))


def test_worker_that_left_its_process_group_is_stopped_too(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    """Only its group was signalled, and a failure elsewhere took 10 s."""

    def leave_or_fail() -> None:
        if os.environ["RANK"] == "0":
            os.setpgid(0, os.getpgid(os.getppid()))
            (tmp_path / "left").touch()
            time.sleep(1000)
        assert processes.wait_until((tmp_path / "left").exists)
        raise ValueError("elsewhere")

    launcher.run(os.getpid)
    with soon(), pytest.raises(ValueError, match="elsewhere"):
        launcher.run(leave_or_fail)


def test_rank_that_has_returned_but_not_ended_does_not_delay_a_failure(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    """SIGTERM spared it, and SIGKILL came after shutdown_timeout."""

    def return_or_fail() -> None:
        if os.environ["RANK"] == "0":
            threading.Thread(target=time.sleep, args=(1000,)).start()
            return
        assert processes.wait_until((tmp_path / "gate").exists, 60)
        raise ValueError("elsewhere")

    run = launcher.submit(return_or_fail)
    assert processes.wait_until(lambda: "waits for threads" in str(run.stacks()), 30)
    (tmp_path / "gate").touch()
    with soon(), pytest.raises(ValueError, match="elsewhere"):
        run.result(timeout=60)


@pytest.mark.slow
def test_sigterm_is_delivered_once(cluster: None, tmp_path: Path) -> None:
    """It went to the group and to its leader: a handler that saves a checkpoint began twice."""

    def count_or_fail() -> None:
        if os.environ["RANK"] == "1":
            assert processes.wait_until((tmp_path / "ready").exists)
            raise ValueError("stop")

        def save(_signum: int, _frame: object) -> None:
            with (tmp_path / "saved").open("a") as file:
                file.write("x")
            time.sleep(0.3)  # a second one would begin it again
            os._exit(0)

        signal.signal(signal.SIGTERM, save)
        (tmp_path / "ready").touch()
        time.sleep(1000)

    with trx.Launcher(workers_per_host=2, shutdown_timeout=30).session() as session:
        for times in range(1, 9):
            with pytest.raises(ValueError, match="stop"):
                session.run(count_or_fail)
            assert (tmp_path / "saved").read_text() == "x" * times
            (tmp_path / "ready").unlink()
