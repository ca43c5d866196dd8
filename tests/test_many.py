"""As many hosts and workers as one machine can start."""

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from tests.clusters.raylets import raylets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def rank_and_sum() -> tuple[int, int]:
    total = torch.tensor(1)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


@pytest.mark.exhaustive
def test_sixteen_nodes_of_one_worker() -> None:
    with raylets(*[{"num_cpus": 1}] * 16):
        result = trx.launch(rank_and_sum, hostnames=16, workers_per_host=1)

        assert list(result) == [(rank, 16) for rank in range(16)]
        assert len(set(result.hostnames)) == 16


def test_sixty_four_workers_on_one_node(cluster: None) -> None:
    joined = trx.launch(rank_and_sum, workers_per_host=64)
    assert list(joined) == [(rank, 64) for rank in range(64)]
