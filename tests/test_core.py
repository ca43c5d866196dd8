"""What a launch promises on any cluster.

Run on one host with everything else, and by test_shapes.py on several; `launcher` has two workers on
each.
"""

import concurrent.futures
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from tests.processes import above, is_alive, of_pool, own_mark, wait_until
from tests.soon import raised_soon, soon


class OwnError(Exception):
    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} {number}")
        self.number = number


def place() -> tuple[int, int, int]:
    return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["GROUP_RANK"])


def test_ranks_are_contiguous_per_host_and_join_one_group(launcher: trx.Launcher) -> None:
    def add_up(start: int) -> tuple[tuple[int, int, int], float]:
        total = torch.tensor(float(start + dist.get_rank()))
        dist.all_reduce(total)
        return place(), total.item()

    result = launcher.run(add_up, 1)

    size = 2 * len(result.hostnames)
    assert list(result) == [((r, r % 2, r // 2), size * (size + 1) / 2) for r in range(size)]
    assert len(set(result.hostnames)) == len(result.hostnames)


def test_store_is_served_until_the_last_rank_has_returned(launcher: trx.Launcher) -> None:
    """Also when all ranks of the first host, where it is, have done so long before."""

    def use_the_store() -> bytes:
        if dist.get_rank() < dist.get_world_size() - 1:
            return b""
        time.sleep(1.5)
        store = dist.distributed_c10d._get_default_store()
        store.set("late", "but served")
        return store.get("late")

    assert list(launcher.run(use_the_store))[-1] == b"but served"


def test_values_are_found_by_rank_and_by_place(launcher: trx.Launcher) -> None:
    result = launcher.run(place)

    for host_index, hostname in enumerate(result.hostnames):
        for local_rank in (0, 1):
            rank = 2 * host_index + local_rank
            assert result.rank(rank) == (rank, local_rank, host_index)
            assert result.index(hostname, local_rank) == result.rank(rank)
            assert result.results[hostname][local_rank] == result.rank(rank)
            assert ray.get(result.ref(rank)) == result.rank(rank)


def test_tensors_go_in_and_come_out(launcher: trx.Launcher) -> None:
    def scale(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(dist.get_rank() + 1)

    result = launcher.run(scale, torch.arange(1000.0))

    for rank, tensor in enumerate(result):
        assert torch.equal(tensor, torch.arange(1000.0) * (rank + 1))


def test_rank_0s_host_is_the_master(launcher: trx.Launcher) -> None:
    result = launcher.run(lambda: (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]))

    assert len(set(result)) == 1
    assert result.rank(0)[0] in {node["NodeManagerAddress"] for node in ray.nodes()}


def test_functions_make_groups_of_their_own(launcher: trx.Launcher) -> None:
    def groups() -> tuple[float, float]:
        ours, theirs = torch.ones(1), torch.ones(1)
        every_second = dist.new_group(list(range(0, dist.get_world_size(), 2)))
        if dist.get_rank() % 2 == 0:
            dist.all_reduce(ours, group=every_second)
        dist.barrier()  # a rank that leaves ends the group of one that still connects
        dist.destroy_process_group()
        for _ in range(3):
            dist.init_process_group("gloo")
            dist.all_reduce(theirs)
            dist.destroy_process_group()
        return ours.item(), theirs.item()

    result = launcher.run(groups)

    size = len(result)
    assert list(result) == [(1.0 if rank % 2 else size / 2, size**3) for rank in range(size)]


def test_environment_reaches_every_rank(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=2, extra_env_vars={"OF_THIS_LAUNCH": "a b"})

    assert set(launcher.run(lambda: os.environ["OF_THIS_LAUNCH"])) == {"a b"}


def test_session_runs_again_in_new_processes(cluster: None) -> None:
    with trx.Launcher(workers_per_host=2).session() as session:
        hosts = session.run(os.getpid).hostnames
        first, second = session.run(os.getpid), session.run(os.getpid)

    assert first.hostnames == second.hostnames == hosts
    assert len({*first, *second}) == 2 * len(first), "all these hosts are on one machine"


def test_what_the_last_rank_raises_arrives_as_itself(launcher: trx.Launcher) -> None:
    def fail() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OwnError("number", 7)
        dist.all_reduce(torch.ones(1))

    hostnames = launcher.run(place).hostnames
    for _ in range(2):
        caught = raised_soon(OwnError, launcher.run, fail)

        assert type(caught.value) is OwnError
        assert str(caught.value) == "number 7"
        assert caught.value.number == 7
        cause = caught.value.__cause__
        assert isinstance(cause, trx.RemoteFailure)
        last = 2 * len(hostnames) - 1
        assert (cause.rank, cause.local_rank, cause.hostname) == (last, 1, hostnames[-1])


def test_death_of_the_last_rank_is_named(launcher: trx.Launcher) -> None:
    def die() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    hostnames = launcher.run(place).hostnames
    for _ in range(2):
        with pytest.raises(trx.WorkerFailedError) as caught:
            launcher.run(die)

        error = caught.value
        last = 2 * len(hostnames) - 1
        assert (error.rank, error.hostname, error.signal) == (last, hostnames[-1], signal.SIGKILL)


def end_on_the_last(how: str) -> object:
    if dist.get_rank() < dist.get_world_size() - 1:
        time.sleep(1000)
    time.sleep(0.3)  # until all are at it
    if how == "exit":
        os._exit(0)
    elif how == "lock raised":
        error = OwnError("no", 1)
        error.lock = threading.Lock()  # pyright: ignore[reportAttributeAccessIssue]
        raise error
    elif how == "lock returned":
        return threading.Lock()
    elif how in ("template", "agent"):
        os.kill(above(os.getpid())[how], signal.SIGKILL)
    time.sleep(1000)
    return None


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("exit", trx.WorkerFailedError, "ended with exit code 0 before its function returned"),
        (
            "lock raised",
            trx.WorkerFailedError,
            "raised tests.test_core.OwnError: no 1 (shown as text",
        ),
        ("lock returned", trx.PayloadError, "the return value of rank LAST"),
        ("template", trx.AgentFailedError, "the template process, from which workers are forked"),
        ("agent", trx.AgentFailedError, "the agent died"),
    ],
)
def test_every_kind_of_failure_on_the_last_host_is_told_soon_and_leaves_nothing(
    launcher: trx.Launcher, how: str, error: type[Exception], said: str
) -> None:
    result = launcher.run(own_mark)
    last = len(result) - 1
    caught = raised_soon(error, launcher.run, end_on_the_last, how)

    assert said.replace("LAST", str(last)) in str(caught.value)
    assert result.hostnames[-1] in str(caught.value)
    notes = getattr(caught.value, "__notes__", [])
    others_live = how not in ("template", "agent") or len(result.hostnames) > 1
    assert any("What the others were doing:" in note for note in notes) is others_live
    ended = {"template", "agent"} & {how}
    for rank, mark in enumerate(result):
        expected = 0 if ended and rank >= last - 1 else 3  # else keepers and template
        assert wait_until(lambda: len(of_pool(mark)) == expected)  # noqa: B023
    assert len(launcher.run(place)) == last + 1


def test_failure_ends_ranks_that_wait_for_ever(launcher: trx.Launcher) -> None:
    def fail_on_the_last() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OwnError("late", 1)
        time.sleep(1000)

    launcher.run(place)
    caught = raised_soon(OwnError, launcher.run, fail_on_the_last)

    assert caught.value.__notes__[-1].startswith("Stopped by the launch after that: rank 0 on ")


@pytest.mark.unconfigured_logging
def test_every_ranks_lines_arrive_whole(
    launcher: trx.Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        for i in range(100):
            print(f"rank {dist.get_rank()} line {i}")

    size = len(dataclasses.replace(launcher, console_ranks="all").run(write))

    lines = capfd.readouterr().out.splitlines()
    for rank in range(size):
        of_rank = [line for line in lines if f"rank {rank} line" in line]
        assert [line.split()[-1] for line in of_rank] == [str(i) for i in range(100)]


def test_cancel_leaves_nothing(launcher: trx.Launcher, tmp_path: Path) -> None:
    def announce_and_sleep() -> None:
        (tmp_path / f"{os.getpid()} {own_mark()}").touch()
        time.sleep(1000)

    size = len(launcher.run(place))
    run = launcher.submit(announce_and_sleep)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == size, 30)
    assert run.cancel()

    with soon(), pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=30)
    assert run.done()
    workers = [path.name.split() for path in tmp_path.iterdir()]
    assert not any(is_alive(int(pid)) for pid, _ in workers)
    assert all(len(of_pool(mark)) == 3 for _, mark in workers), "keepers and template"
