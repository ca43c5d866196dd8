"""torch's elastic agent whose workers Ray runs: several hosts of one agent."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters

import torchrunx_ray as trx
from tests.clusters.raylets import raylets
from tests.nodes import SOON_DEAD, raylet_pid
from tests.processes import note, wait_until
from torchrunx_ray.elastic import RayElasticAgent, RayRendezvous


@pytest.fixture(scope="module", autouse=True)
def three() -> Iterator[Cluster]:
    head = {"num_cpus": 0, "_system_config": SOON_DEAD}
    with raylets(head, {"num_cpus": 2}, {"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        yield cluster


def seen() -> tuple[str, str, str, int]:
    """Die once on rank 1, then return the ranks and a sum over the group."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return (
        os.environ["GROUP_RANK"],
        os.environ["LOCAL_RANK"],
        os.environ["GROUP_WORLD_SIZE"],
        int(total),
    )


def test_one_agent_has_all_workers_on_all_hosts() -> None:
    params = RendezvousParameters("ray", "", "the run", 3, 3)
    spec = WorkerSpec("trainer", 2, RayRendezvous(params), entrypoint=seen, max_restarts=1)
    agent = RayElasticAgent(spec, DefaultLogsSpecs())

    result = agent.run()

    assert result.return_values == {
        rank: (str(rank // 2), str(rank % 2), "3", 15) for rank in range(6)
    }
    group = agent.get_worker_group()
    assert [worker.local_rank for worker in group.workers] == [0, 1, 0, 1, 0, 1]
    assert len({worker.id for worker in group.workers}) == 6
    assert agent._remaining_restarts == 0


@pytest.mark.exhaustive
def test_hosts_may_have_unequal_workers() -> None:
    params = RendezvousParameters("ray", "", "the run", 2, 2)
    spec = WorkerSpec("trainer", 1, RayRendezvous(params), entrypoint=seen, max_restarts=1)

    result = RayElasticAgent(spec, DefaultLogsSpecs(), workers_per_host=[1, 2]).run()

    assert [value[:2] for value in result.return_values.values()] == [
        ("0", "0"),
        ("1", "0"),
        ("1", "1"),
    ]


STAY = """
import os, signal, sys, time
from pathlib import Path

def leave(signum, frame):
    sys.exit()  # with 0, and its work is not done

signal.signal(signal.SIGTERM, leave)
folder = Path(sys.argv[1])
size, restarts, rank = (os.environ[name] for name in ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "RANK"))
(folder / f"{size} {restarts} {rank}").touch()
print(size, restarts, rank, flush=True)
while not (folder / "return").exists():
    time.sleep(0.05)
(folder / f"returned {size} {rank}").touch()
"""


def test_hosts_come_and_go_without_a_restart(three: Cluster, tmp_path: Path) -> None:
    """A host dies, and later another one joins: the program runs again on 2 hosts, then on 3."""
    program = tmp_path / "stay.py"
    program.write_text(STAY)

    def have_begun(size: int) -> bool:
        return wait_until(lambda: len(list(tmp_path.glob(f"{size} 0 *"))) == size, 60)

    def change_hosts() -> None:
        assert have_begun(3)
        for path in tmp_path.glob("3 0 *"):
            path.unlink()
        os.kill(raylet_pid(next(iter(three.worker_nodes))), signal.SIGKILL)
        assert have_begun(2)
        three.add_node(num_cpus=2)
        assert have_begun(3)

    params = RendezvousParameters("ray", "", "the run", 2, 3)
    spec = WorkerSpec(
        "trainer",
        1,
        RayRendezvous(params),
        entrypoint=sys.executable,
        args=(str(program), str(tmp_path)),
        max_restarts=0,
        monitor_interval=0.1,
    )
    launcher = trx.Launcher(cpus_per_worker=2, gpus_per_worker=0, resize_interval=1)
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ALL)
    agent = RayElasticAgent(spec, logs, shutdown_timeout=2, launcher=launcher)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(agent.run)
        try:
            change_hosts()  # Ray adds nodes only in the main thread
        finally:
            note(tmp_path / "return", "")
        result = running.result()

    assert result.return_values == dict.fromkeys(range(3))
    returned = sorted(path.name for path in tmp_path.glob("returned *"))
    assert returned == ["returned 3 0", "returned 3 1", "returned 3 2"]
    said = {
        str(path.relative_to(tmp_path / "logs")).split("/", 1)[1]: path.read_text()
        for path in (tmp_path / "logs").rglob("stdout.log")
    }
    assert said["attempt_0/2/stdout.log"] == "3 0 2\n"
    assert said["attempt_0.1/1/stdout.log"] == "2 0 1\n"
    assert said["attempt_0.2/2/stdout.log"] == "3 0 2\n"


@pytest.mark.exhaustive
def test_failure_that_no_host_can_be_found_after_is_told_as_well(tmp_path: Path) -> None:
    with raylets({"num_cpus": 1, "_system_config": SOON_DEAD}, {"num_cpus": 1}) as two:
        params = RendezvousParameters("ray", "", "the run", 2, 2, join_timeout=5)
        wait = str(tmp_path)

        def stay() -> None:
            os.environ.pop("PYTEST_CURRENT_TEST", None)
            Path(wait, os.environ["RANK"]).touch()
            signal.pause()

        spec = WorkerSpec("trainer", 1, RayRendezvous(params), entrypoint=stay, max_restarts=1)
        agent = RayElasticAgent(spec, DefaultLogsSpecs())
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(agent.run)
            assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
            (lost,) = two.worker_nodes
            os.kill(raylet_pid(lost), signal.SIGKILL)
            error = running.exception(timeout=100)

    assert isinstance(error, trx.PlacementError), error
    (note_,) = error.__notes__
    assert note_.startswith("The workers had to be started again: ")
