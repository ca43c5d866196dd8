"""Real Ray for every test: one local cluster for the whole session, others where a test needs one."""

from collections.abc import Iterator

import pytest
import ray

import torchrunx_ray as trx


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def launcher(cluster: None) -> trx.Launcher:
    """Two workers on agents that stay warm from test to test."""
    return trx.Launcher(workers_per_host=2)
