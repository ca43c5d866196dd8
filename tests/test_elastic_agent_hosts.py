"""torch's elastic agent whose workers Ray runs: several hosts of one agent."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters

from tests.clusters.raylets import raylets
from torchrunx_ray.elastic import RayElasticAgent, RayRendezvous


@pytest.fixture(scope="module", autouse=True)
def _three() -> Iterator[None]:
    with raylets({"num_cpus": 2}, {"num_cpus": 2}, {"num_cpus": 2}):
        yield


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


def test_hosts_may_have_unequal_workers() -> None:
    params = RendezvousParameters("ray", "", "the run", 2, 2)
    spec = WorkerSpec("trainer", 1, RayRendezvous(params), entrypoint=seen, max_restarts=1)

    result = RayElasticAgent(spec, DefaultLogsSpecs(), workers_per_host=[1, 2]).run()

    assert [value[:2] for value in result.return_values.values()] == [
        ("0", "0"),
        ("1", "0"),
        ("1", "1"),
    ]
