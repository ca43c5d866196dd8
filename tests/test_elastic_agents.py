"""Several elastic agents of ours that form one group, by torch's rendezvous."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters

from tests.elastic import agent_of, free_port, handler_of, shut_down_handlers, spec_of
from tests.groups import summed
from tests.processes import note, wait_until
from torchrunx_ray.driver.running import stopping


@pytest.fixture(autouse=True)
def _cluster(joined: None) -> Iterator[None]:
    """Use the cluster of the session, also in scripts."""
    yield
    shut_down_handlers()


def test_agents_with_unequal_workers_and_roles_form_one_group() -> None:
    """Each agent in a thread of its own; torch's c10d rendezvous gives the ranks."""
    endpoint = f"localhost:{free_port()}"
    shapes = [("master", 1), ("trainer", 2), ("trainer", 3)]

    def seen() -> tuple[int, int, int, int, int]:
        names = ("RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "WORLD_SIZE")
        rank, role_rank, role_size, size = (int(os.environ[name]) for name in names)
        return rank, role_rank, role_size, size, summed()

    def in_thread(role: str, workers: int) -> None:
        params = RendezvousParameters("c10d", endpoint, "together", 3, 3)
        spec = spec_of(seen, workers=workers, role=role)
        spec.rdzv_handler = handler_of(params)
        results.append((role, agent_of(spec, exit_barrier_timeout=20).run()))

    results: list[tuple[str, RunResult]] = []
    threads = [threading.Thread(target=in_thread, args=shape) for shape in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)

    values = {rank: value for _, result in results for rank, value in result.return_values.items()}
    assert sorted(values) == list(range(6))
    assert all(rank == value[0] for rank, value in values.items())
    assert {value[3:] for value in values.values()} == {(6, 15)}
    for role, size in (("master", 1), ("trainer", 5)):
        of_role = [
            value
            for other, result in results
            if other == role
            for value in result.return_values.values()
        ]
        assert sorted(value[1] for value in of_role) == list(range(size))
        assert {value[2] for value in of_role} == {size}


def test_group_grows_when_another_agent_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first agent's workers are stopped for that, and the output of the next ones is written however late.

    Under torch's own agent, torch 2.13's rendezvous waits for ever here.
    """
    monkeypatch.setattr(stopping, "_LAST_LINES_S", 0.1)
    monkeypatch.setattr(stopping, "_STUCK_S", 0.1)
    endpoint = f"localhost:{free_port()}"

    def grow() -> tuple[str, str]:
        note(tmp_path / f"world of {os.environ['WORLD_SIZE']}", "")
        while os.environ["WORLD_SIZE"] == "1":
            time.sleep(0.1)
        time.sleep(1)
        print("at last")
        return os.environ["WORLD_SIZE"], os.environ["TORCHELASTIC_RESTART_COUNT"]

    def in_thread(number: int) -> None:
        params = RendezvousParameters("c10d", endpoint, "grows", 1, 2, last_call_timeout=1)
        spec = spec_of(grow, workers=1, max_restarts=1)
        spec.rdzv_handler = handler_of(params)
        logs = DefaultLogsSpecs(str(tmp_path / f"logs {number}"), redirects=Std.OUT)
        results[number] = agent_of(spec, logs_specs=logs).run()

    results: dict[int, RunResult] = {}
    threads = [threading.Thread(target=in_thread, args=(number,), daemon=True) for number in (0, 1)]
    threads[0].start()
    assert wait_until((tmp_path / "world of 1").exists, 60)
    threads[1].start()
    for thread in threads:
        thread.join(100)

    values = [value for result in results.values() for value in result.return_values.values()]
    assert values == [("2", "0"), ("2", "0")]
    said = [path.read_text() for path in tmp_path.glob("logs */*/attempt_0*/0/stdout.log")]
    assert sorted(said) == [
        "",
        "at last\n",
        "at last\n",
    ]  # the first agent's first worker was stopped


class Together:
    """Agents with one worker each that form one group, in threads; by their roles."""

    def __init__(
        self, function: Callable[[], object], roles: Sequence[str], **options: Any
    ) -> None:
        self.results: dict[str, RunResult] = {}
        self._function = function
        self._options = options
        endpoint = f"localhost:{free_port()}"
        self._params = RendezvousParameters("c10d", endpoint, "together", len(roles), len(roles))
        self._threads = [threading.Thread(target=self._run, args=(role,)) for role in roles]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(100)

    def _run(self, role: str) -> None:
        spec = spec_of(self._function, workers=1, role=role)
        spec.rdzv_handler = handler_of(self._params)
        self.results[role] = agent_of(spec, **self._options).run()


@pytest.mark.parametrize("waits", [True, False])
def test_agent_waits_for_the_workers_of_the_others_but_not_for_ever(
    tmp_path: Path, waits: bool
) -> None:
    may_return = tmp_path / "may return"

    def drift() -> str:
        role = os.environ["ROLE_NAME"]
        assert role == "fast" or wait_until(may_return.exists, 60)
        note(tmp_path / role, "")
        return role

    agents = Together(drift, ["fast", "slow"], exit_barrier_timeout=300 if waits else 1)
    try:
        assert wait_until((tmp_path / "fast").exists, 60)
        assert wait_until(lambda: "fast" in agents.results, 2 if waits else 60) is not waits
    finally:
        note(may_return, "")
        agents.wait()

    values = {role: list(result.return_values.values()) for role, result in agents.results.items()}
    assert values == {"fast": ["fast"], "slow": ["slow"]}


def test_agents_whose_workers_fail_do_not_wait_for_each_other() -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    agents = Together(fail, ["one", "other"], exit_barrier_timeout=300)
    agents.wait()

    assert [result.state for result in agents.results.values()] == [WorkerState.FAILED] * 2


SURVIVOR = """
import os, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.launcher import api
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchrunx_ray.elastic import RayElasticAgent

api.LocalElasticAgent = RayElasticAgent
endpoint, is_host, folder = sys.argv[1:]


def train():
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    Path(folder, f"{size} {os.getppid()}").touch()
    while size == 2:  # until the other one is gone
        dist.all_reduce(torch.ones(1))
        time.sleep(0.1)
    return size, os.environ["TORCHELASTIC_RESTART_COUNT"]


if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1, max_nodes=2, nproc_per_node=1, rdzv_backend="c10d", rdzv_endpoint=endpoint,
        run_id="one dies", max_restarts=3, monitor_interval=0.1,
        rdzv_configs={"is_host": is_host, "last_call_timeout": 3, "keep_alive_interval": 1},
    )
    print(elastic_launch(config, train)())
"""


def test_group_goes_on_when_one_agent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SURVIVOR)
    endpoint = f"localhost:{free_port()}"

    def agent(is_host: bool) -> "subprocess.Popen[str]":
        command = [sys.executable, "train.py", endpoint, str(is_host), str(tmp_path)]
        return subprocess.Popen(
            command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, start_new_session=True
        )

    with agent(is_host=True) as survivor, agent(is_host=False) as victim:
        try:
            assert wait_until(lambda: len(list(tmp_path.glob("2 *"))) == 2, 90)
            os.kill(victim.pid, signal.SIGKILL)
            values, _ = survivor.communicate(timeout=90)
        finally:
            survivor.kill()
            victim.kill()

    assert values.splitlines()[-1].startswith("{0: (1, ")
