"""Hosts that are not ready at the same time, or not at all."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

import torchrunx_ray as trx
from tests import processes
from tests.conftest import RunScript
from torchrunx_ray.driver.agents import pool
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.call.pack_call import put_call
from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.running import start_limits

SLOW_ON_ONE_HOST = """
import os, time
try:
    os.mkdir(os.path.join(os.path.dirname(__file__), "one host imports"))
except FileExistsError:
    pass
else:
    time.sleep(10)
"""

FROZEN_HEAD = """
import dataclasses, os, signal, time
import torchrunx_ray as trx

def wait() -> str:
    while not os.path.exists("gate"):
        time.sleep(0.01)
    return "well"

launcher = trx.Launcher(workers_per_host=1, backend=None)
launcher.run(os.getpid)
run = launcher.submit(wait)
while not run.stacks():
    time.sleep(0.1)
(head,) = [process.process.pid for process in ray._private.worker._global_node.all_processes["gcs_server"]]
os.kill(head, signal.SIGSTOP)
open("gate", "w").close()
print(list(run.result(timeout=60)))
try:
    dataclasses.replace(launcher, placement_timeout=1).submit(os.getpid).result(timeout=60)
except trx.PlacementError as error:
    print(error)
os.kill(head, signal.SIGCONT)
print(len(launcher.run(os.getpid)))
"""


@pytest.fixture
def together(cluster: None) -> trx.Launcher:
    """Two hosts on one node."""
    return trx.Launcher(hostnames=2, placement_strategy="STRICT_PACK", workers_per_host=1)


@pytest.mark.slow
def test_timeout_of_the_group_begins_when_all_hosts_can_fork(
    together: trx.Launcher, tmp_path: Path
) -> None:
    (tmp_path / "slow_on_one_host.py").write_text(SLOW_ON_ONE_HOST)
    launcher = dataclasses.replace(
        together,
        timeout=8,
        preload=("torch.distributed", "slow_on_one_host"),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )

    assert list(launcher.run(lambda: os.environ["RANK"])) == ["0", "1"]


@pytest.mark.slow
def test_error_of_one_host_does_not_wait_for_another_that_is_frozen(
    together: trx.Launcher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env_file = tmp_path / "env_file"
    env_file.touch()
    with dataclasses.replace(together, env_file=env_file).session() as session:
        frozen = session.run(processes.agent_pid).rank(1)
        env_file.unlink()
        os.kill(frozen, signal.SIGSTOP)
        try:
            with pytest.raises(trx.LaunchError, match="env_file"):
                session.submit(os.getpid).result(timeout=60)
        finally:
            os.kill(frozen, signal.SIGCONT)
    assert "does not answer" not in caplog.text


@pytest.mark.slow
def test_agent_that_froze_while_it_rested_is_replaced(
    together: trx.Launcher, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_SILENT_S", 0.5)
    monkeypatch.setattr(pool, "_ANSWER_S", 8.0)
    with together.session() as session:
        before = list(session.run(processes.agent_pid))
        os.kill(before[1], signal.SIGSTOP)
        after = list(session.submit(processes.agent_pid).result(timeout=60))

    assert before[0] == after[0]
    assert before[1] != after[1]
    assert "the idle agent there does not answer" in caplog.text
    assert processes.wait_until(lambda: not processes.is_alive(before[1]), 20)


def test_agent_that_has_not_answered_yet_does_not_rest(one: trx.Launcher) -> None:
    """The next launch would wait for it as long as for a new one, and say that it is new."""
    launcher = dataclasses.replace(one, runtime_env={"env_vars": {"FOR": "a new agent"}})
    wanted = put_call(os.getpid, (), {}, launcher).template

    async def acquire_and_release() -> str:
        (node,) = inventory.live_nodes()
        agent = await pool.acquire(node, "here", wanted, launcher)
        agent.calls.meet.remote(1, False, None)
        await agent.release(linger=1000)
        return agent.calls._actor_id.hex()

    actor = loop.start(acquire_and_release()).result(60)
    untyped_ray: Any = ray
    assert processes.wait_until(
        lambda: untyped_ray._private.state.actors(actor)["State"] == "DEAD", 20
    )


@pytest.mark.slow
def test_agent_is_not_named_after_the_first_run_that_it_served(launcher: trx.Launcher) -> None:
    agents = {
        dataclasses.replace(launcher, name=name, preload=()).run(processes.agent_pid).rank(0)
        for name in ("first", "second")
    }
    assert len(agents) == 1
    untyped_ray: Any = ray
    names = [actor["name"] for actor in untyped_ray.util.list_named_actors(all_namespaces=True)]

    assert names
    assert not any("first" in name or "second" in name for name in names)


@pytest.mark.slow
def test_head_that_is_frozen_costs_neither_a_result_nor_the_placement_timeout(
    run_script: RunScript,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "2")
    done = run_script(FROZEN_HEAD, own_ray={})

    assert done.returncode == 0, done.stderr
    result, placement, again = done.stdout.splitlines()
    assert result == "['well']"
    assert placement.startswith("Ray's head has not answered")
    assert again == "1"
    assert "removing the placement group that holds CPUs and GPUs of" in done.stderr


def test_host_that_cannot_fork_is_told_of_and_fails_the_run_in_the_end(
    one: trx.Launcher,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = tmp_path / "gate"
    (tmp_path / "waits_for_gate.py").write_text(
        f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.05)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(start_limits, "_SLOW_START_S", 1.0)
    monkeypatch.setattr(start_limits, "_START_S", 3.0)
    hangs = dataclasses.replace(one, preload=("waits_for_gate",), linger=0)
    why = "no worker can be forked{}: its template still imports waits_for_gate"
    try:
        with pytest.raises(trx.AgentFailedError, match=why.format(" on .*")) as caught:
            hangs.submit(os.getpid).result(timeout=60)
    finally:
        gate.touch()

    assert str(caught.value).startswith("3 s after the run began")
    assert f"{caught.value.hostname}: 1 s after the run began {why.format('')}" in caplog.text


def test_agent_that_answers_but_is_never_ready_is_replaced_for_that_reason(
    one: trx.Launcher,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was called frozen or cut off."""
    monkeypatch.setattr(pool, "_SILENT_S", 0.2)
    monkeypatch.setattr(pool, "_READY_S", 0.5)
    env_file, gate, first = (tmp_path / name for name in ("env", "gate", "first"))
    env_file.touch()
    launcher = dataclasses.replace(one, env_file=env_file, preload=(), linger=0)
    with launcher.session() as session:
        before = session.run(processes.agent_pid).rank(0)
        env_file.write_text(
            f"if mkdir '{first}' 2>/dev/null; then until [ -e '{gate}' ]; do sleep 0.1; done; fi\n"
        )
        try:
            after = session.submit(processes.agent_pid).result(timeout=60).rank(0)
        finally:
            gate.touch()

    assert before != after
    said = "the idle agent there answers, but was not ready after 0.5 s: "
    assert said in caplog.text
    assert "frozen" not in caplog.text
