"""Values stay on the node that made them until somebody asks, and are told of when they go with it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

import torchrunx_ray as trx
from tests import processes
from tests.clusters.raylets import raylets
from tests.memory import MIB, megabytes, status
from tests.scripts import run_alone

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A head, where the driver is, and two nodes for workers."""
    nodes = {"num_cpus": 2, "object_store_memory": 600 * MIB}
    with raylets({"num_cpus": 0}, nodes, nodes) as cluster:
        yield cluster


def holders(ref: Any) -> set[str]:
    return set(ray.experimental.get_object_locations([ref])[ref]["node_ids"])


def worker_nodes() -> list[str]:
    return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]


@pytest.mark.slow
def test_reference_goes_from_host_to_host_without_the_driver(two_nodes: Cluster) -> None:
    one, other = worker_nodes()
    first = trx.Launcher(hostnames=[one], workers_per_host=1, backend=None).run(megabytes, 200)
    before = status(os.getpid(), "VmRSS")
    ref = first.ref(0)
    assert holders(ref) == {one}

    def look(tensor: torch.Tensor) -> tuple[int, bool]:
        maps = Path(f"/proc/{processes.agent_pid()}/maps").read_text()
        return len(tensor), "libtorch" in maps

    second = trx.Launcher(hostnames=[other], workers_per_host=2, backend=None).run(look, ref)

    assert list(second) == [(200 * MIB, False)] * 2
    assert holders(ref) == {one, other}
    assert status(os.getpid(), "VmRSS") - before < 50 * MIB


@pytest.mark.slow
def test_only_the_value_that_is_asked_for_is_fetched(two_nodes: Cluster) -> None:
    here = ray.get_runtime_context().get_node_id()
    launcher = trx.Launcher(hostnames=worker_nodes(), workers_per_host=1, backend=None)
    result = launcher.run(megabytes, 20)
    assert all(here not in holders(result.ref(rank)) for rank in (0, 1))

    result.rank(1)
    assert here in holders(result.ref(1))
    assert here not in holders(result.ref(0))


@pytest.mark.slow
def test_value_whose_node_has_died_is_told_with_rank_and_host(two_nodes: Cluster) -> None:
    """Last on these nodes: one of them goes."""
    doomed = two_nodes.add_node(num_cpus=1)
    ids = [n["NodeID"] for n in ray.nodes() if n["Resources"].get("CPU") == 1]
    result = trx.Launcher(hostnames=ids, workers_per_host=1, backend=None).run(megabytes, 20)
    two_nodes.remove_node(doomed)

    with pytest.raises(trx.AgentFailedError, match="the value that rank 0 returned is lost") as e:
        result.rank(0)
    assert e.value.hostname == ids[0]


@pytest.mark.slow  # Ray looks for the value for 20 s
def test_value_that_is_lost_names_its_rank(two_nodes: Cluster) -> None:
    """A raw Ray error came out of `rank`. Its agent had ended before the node did."""
    doomed = two_nodes.add_node(num_cpus=3)
    ids = [n["NodeID"] for n in ray.nodes() if n["Resources"].get("CPU") == 3]
    launcher = trx.Launcher(hostnames=ids, workers_per_host=1, backend=None, preload=(), linger=0)
    result = launcher.run(bytearray, 1_000_000)
    two_nodes.remove_node(doomed, allow_graceful=False)

    with pytest.raises(trx.AgentFailedError, match="the value that rank 0 returned is lost on "):
        result.rank(0)


@pytest.mark.slow
def test_value_that_neither_store_nor_disk_takes_is_told_with_both_sizes(
    tmp_path: Path,
) -> None:
    done = run_alone(
        """
import ray, torch, torchrunx_ray as trx
full_disk = {"local_fs_capacity_threshold": 0.0}
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20,
         _system_config=full_disk)
launcher = trx.Launcher(workers_per_host=1, backend=None)
try:
    launcher.run(lambda: torch.ones(25 * 2**20)).rank(0)
except trx.PayloadError as error:
    print(error.rank, error)
try:
    launcher.run(len, torch.ones(25 * 2**20))
except trx.PayloadError as error:
    print(error.rank, error)
""",
        tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert "0 the return value of rank 0 cannot be stored on " in done.stdout
    assert "it has 100 MiB; the node's object store has 80 MiB" in done.stdout
    assert "they have 100 MiB; the object store of the driver's node has 80 MiB" in done.stdout
