"""Several functions in one script: each begins on hosts that the one before has left."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from ray._private import internal_api
from ray.cluster_utils import Cluster

import torchrunx_ray as trx
from tests import processes
from tests.clusters.raylets import raylets

MIB = 2**20
WORKING_MEMORY = 256 * MIB
MODEL = 64 * MIB


@pytest.mark.slow
def test_example_trains_and_evaluates(joined: None, tmp_path: Path) -> None:
    # First here: a lane's shared Ray cannot be joined while this file's own is there.
    example = Path(__file__).parents[1] / "examples" / "train_then_evaluate.py"
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )

    assert "that the model has not seen: 0.000" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    nodes = {"num_cpus": 2, "object_store_memory": 400 * MIB}
    with raylets({"num_cpus": 0}, nodes, nodes) as cluster:
        yield cluster


@dataclass
class Trained:
    """What a rank returns; the model is rank 0's."""

    model: torch.Tensor | None
    pid: int
    above: dict[str, int]
    memory_at_its_height: int


def train() -> Trained:
    working = torch.ones(WORKING_MEMORY, dtype=torch.uint8)
    torch.distributed.barrier()
    model = working[:MODEL].clone() if torch.distributed.get_rank() == 0 else None
    pid = os.getpid()
    return Trained(model, pid, processes.above(pid), anonymous_memory([pid]))


def evaluate(trained: Trained) -> int:
    assert trained.model is not None
    return int(trained.model.sum(dtype=torch.int64))


def anonymous_memory(pids: list[int]) -> int:
    """Bytes that are no file's, as far as they are not shared with others."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    found = [re.search(r"^Pss_Anon:\s+(\d+) kB", text, re.MULTILINE) for text in texts]
    return sum(int(each[1]) for each in found if each) * 1024


def held_by_object_stores() -> int:
    """Bytes, as Ray counts them on its nodes."""
    stats = [
        internal_api.node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sum(each.store_stats.object_store_bytes_used for each in stats)


@pytest.mark.slow
def test_memory_is_free_between_functions(two_nodes: Cluster) -> None:
    trainer = trx.Launcher(workers_per_host=2, backend="gloo")
    evaluator = trx.Launcher(hostnames=1, workers_per_host=1, backend="gloo")
    stay = sorted({pid for rank in trainer.run(train) for pid in rank.above.values()})
    assert processes.wait_until(lambda: held_by_object_stores() < MIB)
    before = anonymous_memory(stay)

    trained = trainer.run(train)
    ranks = [trained.rank(rank) for rank in range(1, 4)]
    assert min(rank.memory_at_its_height for rank in ranks) > WORKING_MEMORY
    assert not any(processes.is_alive(rank.pid) for rank in ranks)
    assert {pid for rank in ranks for pid in rank.above.values()} == set(stay)
    assert anonymous_memory(stay) - before < 30 * MIB
    assert MODEL <= held_by_object_stores() < MODEL + 5 * MIB

    assert evaluator.run(evaluate, trained.ref(0)).rank(0) == MODEL
    del trained
    assert processes.wait_until(lambda: held_by_object_stores() < 5 * MIB)
