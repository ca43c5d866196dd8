"""A restart does not wait for what it does not need, and sends nothing twice."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import torchrunx_ray as trx
from tests.memory import MIB, megabytes
from tests.processes import agent_pid, note, wait_until
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.worker import preload


def kill_in_first_attempt(folder: Path) -> float:
    """Return the time of the next attempt's begin after the death of rank 1; rank 0 does not show its stacks."""
    begun = time.time()
    if trx.context().attempt > 0:
        return begun - float((folder / "killed").read_text())
    if os.environ["RANK"] == "0":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        note(folder / "blocked", "")
        reader, _ = os.pipe()
        ctypes.PyDLL(None).read(reader, ctypes.create_string_buffer(1), 1)  # keeps the GIL
    wait_until((folder / "blocked").exists)
    time.sleep(0.2)
    (folder / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.alone
def test_rank_whose_stacks_do_not_come_is_stopped_after_a_tenth_of_a_second(
    cluster: None, tmp_path: Path
) -> None:
    """Without restarts, a failure waits for the stacks for a second."""
    launcher = trx.Launcher(workers_per_host=2, backend=None, max_restarts=1)
    launcher.run(os.getpid)
    taken: list[float] = []
    for i in range(5):
        folder = tmp_path / str(i)
        folder.mkdir()
        taken += launcher.run(kill_in_first_attempt, folder)

    assert min(taken) < 0.6


def test_killed_worker_is_the_failure_although_its_peers_are_stopped_at_once(
    cluster: None, tmp_path: Path
) -> None:
    def wait_or_die() -> None:
        rank, attempt = os.environ["RANK"], trx.context().attempt
        if attempt == 0 and rank == "1":
            wait_until((tmp_path / "waits").exists)
            os.kill(os.getpid(), signal.SIGKILL)
        while attempt == 0:
            note(tmp_path / "waits", "")
            torch.distributed.barrier()

    launcher = trx.Launcher(workers_per_host=3, max_restarts=1)
    first, second = launcher.run(wait_or_die).attempts
    assert first.failure is not None
    assert first.failure.startswith("rank 1 on ")
    assert "SIGKILL" in first.failure
    assert second.why == "returned"


class Sent:
    """What the driver sends to agents with `start`: a recorder around the real call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[int] = []
        """Number of values that each call sent."""
        ask = Connection.ask

        async def record(connection: Connection, method: Any, *args: Any) -> Any:
            if getattr(method, "_method_name", "") == "start":
                self.values.append(len(args) - 1)
            return await ask(connection, method, *args)

        monkeypatch.setattr(Connection, "ask", record)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def fail_twice(argument: Any, end: str) -> int:
    attempt = trx.context().attempt
    if attempt < 2 and end == "raise":
        raise ValueError
    if attempt == 0 and end == "agent":
        os.kill(agent_pid(), signal.SIGKILL)
        time.sleep(1000)
    if attempt == 0 and end == "template":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    return len(argument)


@pytest.mark.parametrize(
    ("end", "values"), [("raise", [1, 0, 0]), ("template", [1, 0]), ("agent", [1, 1])]
)
def test_arguments_are_sent_again_only_to_a_new_agent(
    cluster: None, sent: Sent, end: str, values: Sequence[int]
) -> None:
    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=3)
    assert list(launcher.run(fail_twice, megabytes(1), end)) == [MIB]
    assert sent.values == values


def test_references_in_the_arguments_are_not_fetched_again(cluster: None, sent: Sent) -> None:
    import ray

    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=3)
    assert list(launcher.run(fail_twice, ray.put(megabytes(1)), "raise")) == [MIB]
    assert sent.values == [2, 0, 0]


def test_each_run_of_a_session_sends_its_own_arguments(cluster: None, sent: Sent) -> None:
    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=3)
    with launcher.session() as session:
        assert [session.run(fail_twice, "x" * i, "raise").rank(0) for i in (1, 2)] == [1, 2]
    assert sent.values == [1, 0, 0] * 2


@pytest.mark.exhaustive
def test_arguments_of_a_run_that_has_ended_are_freed(cluster: None) -> None:
    """The object store then has room for the next ones."""
    import ray

    def free() -> float:
        return ray.available_resources()["object_store_memory"]

    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=3)
    with launcher.session() as session:
        before = free()
        session.run(fail_twice, megabytes(200), "raise")
        assert wait_until(lambda: free() > before - 50 * MIB, 30)


@pytest.mark.exhaustive
def test_template_learns_from_a_worker_that_was_killed(cluster: None) -> None:
    def step() -> bool:
        had_it = preload._LATE in sys.modules
        torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
        if trx.context().attempt == 0:
            time.sleep(8)  # the template looks when it is idle, and then imports
            os.kill(os.getpid(), signal.SIGKILL)
        return had_it

    launcher = trx.Launcher(
        workers_per_host=1, max_restarts=1, extra_env_vars={"OWN_AGENT_FOR": "killed"}
    )
    assert launcher.run(step).rank(0)


@pytest.mark.exhaustive
def test_worker_may_die_while_its_template_learns(cluster: None) -> None:
    """The template then forks after the import: a worker with half of a module would fail."""

    def step() -> int:
        torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
        attempt = trx.context().attempt
        if attempt < 3:
            time.sleep(0.5 + 0.3 * attempt)
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt

    launcher = trx.Launcher(
        workers_per_host=1, max_restarts=3, extra_env_vars={"OWN_AGENT_FOR": "learning late"}
    )
    assert list(launcher.run(step)) == [3]
