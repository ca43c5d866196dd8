"""An agent that stays after its launch serves the next one: for how long, and with what."""

import contextlib
import dataclasses
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ray

import torchrunx_ray as trx
from tests import processes
from tests.clusters.raylets import raylets
from torchrunx_ray.driver.agents import pool
from torchrunx_ray.driver.cluster.connection import untyped_ray


def own_agent(test: str, **options: Any) -> trx.Launcher:
    """Return a launcher whose agents no other test has warmed."""
    of_test = {"OWN_AGENT_FOR": test}
    without_torch: dict[str, Any] = {"backend": None, "preload": ()}
    return trx.Launcher(workers_per_host=1, extra_env_vars=of_test, **without_torch, **options)


def test_nothing_but_keepers_and_template_lingers_and_not_for_long(cluster: None) -> None:
    def leave_things_behind() -> str:
        processes.daemonise()
        return processes.own_mark()

    mark = trx.Launcher(workers_per_host=2, linger=2).run(leave_things_behind).rank(0)

    assert len(processes.of_pool(mark)) == 3
    assert processes.wait_until(lambda: processes.of_pool(mark) == {})


@pytest.mark.slow
def test_short_linger_is_used(cluster: None) -> None:
    """An agent that would end within 2 s was never taken."""
    launcher = own_agent("short linger", linger=1.5)

    assert launcher.run(os.getppid).rank(0) == launcher.run(os.getppid).rank(0)


@pytest.mark.slow
def test_launches_at_the_end_of_linger_all_work(cluster: None) -> None:
    launcher = own_agent("a race", linger=0.3)
    for i in range(8):
        assert launcher.run(lambda: "well").rank(0) == "well"
        time.sleep(0.26 + 0.01 * i)


def test_agent_that_is_let_rest_when_it_serves_the_next_run_already_stays(
    cluster: None, tmp_path: Path
) -> None:
    """Ray may deliver calls in another order. A minute later the agent was gone, and the run hung."""

    def wait_for_go() -> str:
        (tmp_path / "runs").touch()
        assert processes.wait_until((tmp_path / "go").exists, 60)
        return "well"

    launcher = own_agent("a late rest")
    launcher.run(os.getpid)
    agent = pool._resting[-1]
    run = launcher.submit(wait_for_go)
    assert processes.wait_until((tmp_path / "runs").exists, 60)
    late_claim, linger_s = agent.claims - 1, 0.1
    untyped_ray.get(agent.calls.rest.remote(late_claim, linger_s))
    time.sleep(1)
    (tmp_path / "go").touch()

    assert run.result(timeout=60).rank(0) == "well"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["agent", "outer keeper", "keeper", "template"])
def test_launch_after_a_resting_agent_was_killed(cluster: None, victim: str) -> None:
    """It failed with "the agent could not be started"; a replaced template stayed alive."""
    launcher = own_agent(victim)
    pids = launcher.run(lambda: processes.above(os.getpid())).rank(0)
    os.kill(pids[victim], signal.SIGKILL)
    assert processes.wait_until(lambda: not all(map(processes.is_alive, pids.values())))

    now = launcher.run(lambda: processes.above(os.getpid())).rank(0)
    assert not {now[role] for role in ("outer keeper", "keeper", "template")} & set(pids.values())
    assert processes.wait_until(lambda: not processes.is_alive(pids["template"]))


def test_file_that_a_run_writes_does_not_cost_the_next_its_template(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was taken for an env_file that had changed."""
    monkeypatch.chdir(tmp_path)
    launcher = trx.Launcher(workers_per_host=1)

    def write() -> int:
        Path(f"checkpoint{time.time_ns()}").touch()
        return os.getppid()

    assert launcher.run(write).rank(0) == launcher.run(write).rank(0)


def test_launches_that_follow_each_other_share_one_agent_of_several(
    cluster: None, tmp_path: Path
) -> None:
    """They took turns: every second launch found cold memory, and no agent rested long enough to end."""
    launcher = own_agent("two at once")

    def wait_for_each_other() -> int:
        (tmp_path / str(os.getpid())).touch()
        assert processes.wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        return os.getppid()

    runs = [launcher.submit(wait_for_each_other) for _ in range(2)]
    templates = {run.result(timeout=60).rank(0) for run in runs}
    used = [launcher.run(os.getppid).rank(0) for _ in range(3)]

    assert len(templates) == 2
    assert len(set(used)) == 1
    assert set(used) < templates


@pytest.mark.slow
def test_no_more_than_eight_agents_rest_on_a_node(cluster: None) -> None:
    """Every value of a variable needs a template of its own: a sweep of them left one each."""

    def names() -> set[str]:
        found = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in found if actor["name"].startswith("agent-")}

    for i in range(10):
        own_agent(str(i)).run(int)
    assert processes.wait_until(lambda: len(names()) == 8, 15), names()


@pytest.mark.slow
def test_other_hosts_may_be_done_before_the_first_one_has_begun() -> None:
    """The first host serves the store until the others have ended; it waited for ever."""
    with raylets({"num_cpus": 1}, {"num_cpus": 1}):
        first, second = (node["NodeID"] for node in ray.nodes())
        launcher = trx.Launcher(workers_per_host=1, backend=None, preload=())
        dataclasses.replace(launcher, hostnames=[second]).run(os.getpid)

        run = dataclasses.replace(launcher, hostnames=[first, second]).submit(os.getpid)
        assert len(run.result(timeout=30)) == 2


def taken_agent(env_file: Path) -> tuple[pool.PooledAgent, dict[str, int]]:
    """Return an agent that no other launch takes, and its processes."""
    launcher = trx.Launcher(workers_per_host=1, backend=None, env_file=str(env_file))
    pids = launcher.run(lambda: processes.above(os.getpid())).rank(0)
    return pool._resting.pop(), pids


def children(parent: int) -> list[int]:
    found: list[int] = []
    for pid in processes.pids():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if processes.parent(pid) == parent and processes.is_alive(pid):
                found.append(pid)
    return found


@pytest.mark.slow
def test_agent_whose_rest_is_heard_before_its_claim_still_ends(
    cluster: None, tmp_path: Path
) -> None:
    """Ray delivered the two in another order, or the claim was cancelled: the agent stayed for ever."""
    (tmp_path / "env.sh").touch()
    agent, pids = taken_agent(tmp_path / "env.sh")
    untyped_ray.get(agent.calls.rest.remote(agent.claims + 1, 0.5))
    met = untyped_ray.get(agent.calls.meet.remote(agent.claims + 1, True))

    assert met.master_port is None
    assert processes.wait_until(lambda: not any(map(processes.is_alive, pids.values())))


@pytest.mark.slow
def test_agent_that_two_runs_claim_at_once_has_one_template_and_one_port(
    cluster: None, tmp_path: Path
) -> None:
    """The first was cancelled while its template was started; another idle template stayed."""
    (tmp_path / "env.sh").write_text("sleep 1")
    agent, pids = taken_agent(tmp_path / "env.sh")
    os.kill(pids["template"], signal.SIGKILL)
    assert processes.wait_until(lambda: children(pids["agent"]) == [])
    claims = agent.claims + 1, agent.claims + 2
    first, second = untyped_ray.get([agent.calls.meet.remote(each, True) for each in claims])

    assert first.master_port is None
    assert second.master_port is not None
    assert len(children(pids["agent"])) == 1, "the keeper above the template"

    untyped_ray.get(agent.calls.meet.remote(agent.claims + 3, False))
    with pytest.raises(ConnectionRefusedError):  # or that run's host would serve a store
        socket.create_connection((second.ip, second.master_port))
    untyped_ray.get(agent.calls.rest.remote(agent.claims + 3, 0.1))
    assert processes.wait_until(lambda: not processes.is_alive(pids["agent"]))
