"""What the workers are doing: on demand, and beside failures."""

import atexit
import ctypes
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from tests import processes
from torchrunx_ray.agent.stacks import handles_usr2
from torchrunx_ray.driver.report.stacks import Stacks, in_words
from torchrunx_ray.driver.running import stragglers


def rank() -> int:
    return int(os.environ["RANK"])


def wait_for_stacks(run: "trx.Run[Any]", what: str) -> Stacks:
    """As soon as they show this."""
    seen: list[Stacks] = []

    def shows() -> bool:
        seen.append(run.stacks())
        return what in str(seen[-1])

    assert processes.wait_until(shows, 30), str(seen[-1])
    return seen[-1]


@pytest.fixture
def waiting_for_one(cluster: None) -> "Iterator[trx.Run[None]]":
    """Four ranks, three of them in a collective that rank 1 does not join."""

    def wait_for_one() -> None:
        if rank() == 1:
            time.sleep(1000)
        dist.all_reduce(torch.ones(1))

    run = trx.Launcher(workers_per_host=4).submit(wait_for_one)
    yield run
    run.cancel()
    run.wait()


def test_equal_stacks_are_one_group(waiting_for_one: "trx.Run[None]") -> None:
    wait_for_stacks(waiting_for_one, "rank 1: wait_for_one (test_stacks.py:")
    stacks = wait_for_stacks(waiting_for_one, "ranks 0, 2-3: wait_for_one (test_stacks.py:")

    waiting, lone = stacks.summary.splitlines()
    assert waiting.endswith("), in all_reduce"), "the user's function, and what it is in"
    assert lone.startswith("rank 1: wait_for_one (test_stacks.py:")
    assert set(stacks.by_rank) == {0, 1, 2, 3}
    assert f"wait_for_one ({__file__}:" in str(stacks)
    assert [ranks for ranks, _frames in stacks.groups] == [[0, 2, 3], [1]]


def test_asking_does_not_disturb_a_run(launcher: trx.Launcher, tmp_path: Path) -> None:
    def train() -> float:
        total, is_open = torch.ones(1), torch.zeros(1)
        while not is_open:
            dist.all_reduce(total)
            total /= dist.get_world_size()
            is_open.fill_((tmp_path / "gate").exists())
            dist.all_reduce(is_open)
        return total.item()

    run = launcher.submit(train)
    wait_for_stacks(run, "train (test_stacks.py:")
    for _ in range(20):
        assert run.stacks()
    (tmp_path / "gate").touch()

    assert list(run.result(timeout=60)) == [1.0, 1.0]


@pytest.mark.slow
def test_asking_in_the_middle_of_a_call_does_not_crash_the_worker(
    cluster: None, tmp_path: Path
) -> None:
    """faulthandler's signal handler, asked alone, crashed one of a few hundred times."""

    def call() -> str:
        while not (tmp_path / "gate").exists():
            for _ in range(1000):
                sorted(range(100), key=lambda number: number)
        return "alive"

    run = trx.Launcher(workers_per_host=1, backend=None).submit(call)
    wait_for_stacks(run, "call (test_stacks.py:")
    for _ in range(250):
        assert run.stacks()
    (tmp_path / "gate").touch()

    assert run.result(timeout=60).rank(0) == "alive"


def test_main_thread_is_seen_among_very_many(launcher: trx.Launcher) -> None:
    """faulthandler shows a hundred threads, the main one not among them."""

    def train() -> None:
        ends = threading.Event()
        for _ in range(150):
            threading.Thread(target=ends.wait, daemon=True).start()
        time.sleep(1000)

    run = launcher.submit(train)
    stacks = wait_for_stacks(run, "train (test_stacks.py:")
    assert stacks.by_rank[0].count("Thread 0x") <= 151
    run.cancel()
    run.wait()


def test_rank_that_holds_the_gil_in_c_answers(launcher: trx.Launcher, tmp_path: Path) -> None:
    def park(libc: ctypes.PyDLL, descriptor: int) -> None:
        libc.read(descriptor, ctypes.create_string_buffer(1), 1)

    def train(folder: Path) -> None:
        if rank() == 0:
            nothing_comes, _ours = os.pipe()
            libc = ctypes.PyDLL(None)
            (folder / "parking").touch()
            park(libc, nothing_comes)
        time.sleep(1000)

    run = launcher.submit(train, tmp_path)
    assert processes.wait_until(lambda: any(tmp_path.iterdir()), 30)
    stacks = wait_for_stacks(run, "rank 0: park (test_stacks.py:")
    assert "no answer" not in str(stacks)
    run.cancel()
    run.wait()


def test_there_are_none_before_and_after_the_workers(launcher: trx.Launcher) -> None:
    with launcher.session() as session:
        before = session.submit(time.sleep, 1)
        run = session.submit(os.getpid)  # waits for its turn
        assert not run.stacks()
        before.result()
        run.result()
    assert not run.stacks()
    assert str(run.stacks()) == ""


def test_worker_that_cannot_answer_and_takes_no_signal_lives(cluster: None, tmp_path: Path) -> None:
    def refuse() -> str:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # by which it would be killed
        libc = ctypes.PyDLL(None)  # keeps the GIL
        (tmp_path / "deaf").touch()
        libc.usleep(5_000_000)
        return "alive"

    run = trx.Launcher(workers_per_host=1, backend=None).submit(refuse)
    assert processes.wait_until(lambda: any(tmp_path.iterdir()), 30)
    # The first answers may come from before the call into C.
    assert processes.wait_until(lambda: "rank 0: no answer" in run.stacks().summary, 5)
    assert run.result().rank(0) == "alive"


def test_one_rank_that_does_not_answer_does_not_cost_the_others_answers(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    def train() -> None:
        (tmp_path / str(os.getpid())).touch()
        if rank() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(6)

    run = launcher.submit(train)
    assert processes.wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    stacks = wait_for_stacks(run, "rank 0: no answer")
    assert "rank 1: train (test_stacks.py:" in stacks.summary
    for path in tmp_path.iterdir():
        os.kill(int(path.name), signal.SIGCONT)
    run.result()


def test_process_whose_name_the_kernel_cut_inside_a_letter_can_be_asked() -> None:
    name = Path("/proc/self/comm").read_bytes().rstrip()
    try:
        ctypes.CDLL(None).prctl(15, "ä".encode() * 8, 0, 0, 0)  # PR_SET_NAME takes 15 bytes
        assert handles_usr2(os.getpid()) == callable(signal.getsignal(signal.SIGUSR2))
    finally:
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)


def test_ranks_are_shown_as_ranges() -> None:
    assert in_words([3]) == "rank 3"
    assert in_words([7, 0, 2, 3, 4, 9, 8]) == "ranks 0, 2-4, 7-9"


def test_failure_tells_what_the_others_were_doing(launcher: trx.Launcher) -> None:
    def train() -> None:
        if rank() == 1:
            time.sleep(0.5)
            raise ValueError("bad batch")
        time.sleep(1000)

    with pytest.raises(ValueError, match="bad batch") as caught:
        launcher.run(train)

    assert any("rank 0: train (test_stacks.py:" in note for note in caught.value.__notes__)
    cause = caught.value.__cause__
    assert isinstance(cause, trx.RemoteFailure)
    assert f"train ({__file__}:" in cause.stacks
    assert "rank 1" not in cause.stacks


def test_death_tells_what_the_others_were_doing(launcher: trx.Launcher) -> None:
    def train() -> None:
        if rank() == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)

    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(train)

    assert caught.value.stacks.startswith("rank 0: train (test_stacks.py:")
    assert any("rank 0: train (test_stacks.py:" in note for note in caught.value.__notes__)


def test_ranks_that_do_not_join_are_named_with_what_holds_them(
    cluster: None, tmp_path: Path
) -> None:
    """Whether the ranks that wait for them give up later, or a moment earlier."""
    (tmp_path / "slow_to_join.py").write_text(
        "import datetime, os, time, torch.distributed as dist\n"
        "join = dist.init_process_group\n"
        "def hang(*args, rank, timeout, **kwargs):\n"
        "    time.sleep(1000 if rank == 1 else 0)\n"
        f"    is_early = os.path.exists({str(tmp_path / 'early')!r})\n"
        "    timeout -= datetime.timedelta(seconds=0.3 if is_early else 0)\n"
        "    return join(*args, rank=rank, timeout=timeout, **kwargs)\n"
        "dist.init_process_group = hang\n"
    )
    launcher = trx.Launcher(
        workers_per_host=2,
        timeout=4,
        preload=("torch", "torch.distributed", "slow_to_join"),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
    )
    for is_early in (False, True):
        if is_early:
            (tmp_path / "early").touch()
        with pytest.raises(trx.LaunchTimeoutError) as caught:
            launcher.run(os.getpid)

        assert set(caught.value.missing) >= {1}
        assert "after 4 s the process group is still without" in str(caught.value)
        assert any("rank 1: hang (slow_to_join.py:4)" in note for note in caught.value.__notes__)


def test_ranks_that_go_on_long_after_others_are_named(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stragglers, "_RETURNED_S", 0.3)

    def straggle() -> None:
        if rank() == 1:
            time.sleep(2)

    with caplog.at_level(logging.WARNING, "torchrunx_ray"):
        launcher.run(straggle)

    said, *_ = [text for text in caplog.messages if "returned at least" in text]
    assert said.startswith(
        "rank 0 returned at least 0 s ago; these ranks are still running:\nrank 1: "
    )
    assert "straggle (test_stacks.py:" in said


def test_rank_that_returned_and_does_not_end_is_named(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stragglers, "_RETURNED_S", 0.5)

    def leave_a_thread() -> None:
        dist.barrier()  # they return at the same time
        if rank() == 1:
            threading.Thread(target=time.sleep, args=(3,)).start()

    with caplog.at_level(logging.WARNING, "torchrunx_ray"):
        launcher.run(leave_a_thread)

    *_, said = [text for text in caplog.messages if "returned at least" in text]
    waits = "rank 1: has left the function, and waits for threads that the function started: "
    assert f"the launch waits for their processes to end:\n{waits}" in said


@pytest.mark.slow
def test_rank_whose_value_is_copied_is_shown_so(launcher: trx.Launcher) -> None:
    def make_much() -> torch.Tensor | None:
        return torch.ones(2**28) if rank() == 1 else None

    run = launcher.submit(make_much)
    wait_for_stacks(run, "rank 1: has returned, and its value is being copied")
    run.cancel()
    run.wait()


@pytest.mark.unconfigured_logging
def test_stacks_asked_for_by_others_are_shown_as_output(
    launcher: trx.Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    def ask_oneself() -> str:
        os.kill(os.getpid(), signal.SIGUSR2)
        return "alive"

    assert launcher.run(ask_oneself).rank(0) == "alive"
    assert "in ask_oneself" in capfd.readouterr().err


def test_rank_that_does_not_answer_because_it_has_returned_is_told_apart() -> None:
    stacks = Stacks({0: "", 1: "", 2: ""}, returned=[1])
    assert stacks.summary.splitlines()[0] == "rank 1: has returned"
    assert stacks.summary.splitlines()[1].startswith("ranks 0, 2: no answer")
    assert str(stacks) == stacks.summary
    assert stacks.without([0, 2]).summary == "rank 1: has returned"


def test_error_tells_which_rank_had_returned(launcher: trx.Launcher, tmp_path: Path) -> None:
    """The process of this rank still lives when another rank fails, but does not answer in the short time before a restart."""

    def return_or_fail() -> None:
        if os.environ["RANK"] == "0":
            hold_gil = ctypes.PyDLL(None).sleep
            atexit.register(lambda: [(tmp_path / "returned").touch(), hold_gil(1000)])
            return
        assert processes.wait_until((tmp_path / "returned").exists, 60)
        raise ValueError("beside a rank that had returned")

    with pytest.raises(ValueError, match="beside a rank") as caught:
        dataclasses.replace(
            launcher, shutdown_timeout=0.5, max_restarts=1, restart_if=lambda _: False
        ).run(return_or_fail)
    told = "\n".join(caught.value.__notes__)
    assert "rank 0: has returned" in told
    assert "no answer" not in told
