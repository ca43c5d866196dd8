"""The installed versions of Ray, torch and Python say what decisions hang on, in the words that are looked for.

Errors that need a cluster of their own have their tests elsewhere: a store that is full and a value of another cluster
in test_data_between_nodes.py and test_ray_shutdown.py, a refused token in test_cluster_token.py, an actor that never ran
in test_jobs.py, Ray's memory monitor in test_deaths.py.
"""

import subprocess
import sys
import tempfile
from typing import Any

import pytest
import ray
import torch.distributed as dist
from ray.exceptions import RayTaskError

from torchrunx_ray.wire import foreign_errors

_ray: Any = ray


def test_argument_that_ray_has_no_more_is_told_from_a_call_that_failed(cluster: None) -> None:
    def fail(why: str = "of the task itself") -> None:
        raise ValueError(why)

    task = _ray.remote(num_cpus=0, max_retries=0)(fail)
    with pytest.raises(RayTaskError, match="of the task itself") as of_call:
        _ray.get(task.remote())
    with pytest.raises(RayTaskError, match="of the argument") as of_argument:
        _ray.get(task.remote(task.remote("of the argument")))

    assert foreign_errors.lost_argument(str(of_call.value)) is None
    lost = foreign_errors.lost_argument(str(of_argument.value))
    assert lost is not None
    assert "of the argument" in lost


def test_package_that_is_missing_is_named() -> None:
    for name, shown in (("torchrunx_ray", "torchrunx-ray"), ("cloudpickle", "cloudpickle")):
        script = (
            f"import sys; sys.path[:] = []; sys.meta_path = sys.meta_path[:2]; import {name}.part"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=False
        )
        assert foreign_errors.missing_package(done.stderr) == shown, done.stderr

    assert foreign_errors.missing_package("No module named 'torch'") is None


def test_second_default_group_is_told_from_other_errors() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="process group") as caught:
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    finally:
        dist.destroy_process_group()

    assert foreign_errors.is_second_group(caught.value)
    assert not foreign_errors.is_second_group(ValueError("another"))


def test_error_about_a_peer_names_gloo() -> None:
    script = """
import os, sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
dist.barrier()
if rank == 1:
    os._exit(0)
for _ in range(1000):
    dist.all_reduce(torch.ones(1))
"""
    with tempfile.NamedTemporaryFile() as met:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(rank), met.name],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=100)[1] for rank in ranks]

    assert foreign_errors.names_gloo(said[0]), said


def test_actor_whose_node_has_died_is_no_actor_that_was_refused() -> None:
    """A driver with a token was told that the cluster may have none."""
    died = (
        "The actor died because its node has died. Node Id: 3ce84d6f\n\tthe actor's node was terminated "
        "unexpectedly: health check failed due to missing too many heartbeats\n"
    )
    never_ran = "The actor never ran - it was cancelled before it started running."
    assert foreign_errors.has_never_run(never_ran)
    assert foreign_errors.has_never_run("System error: Actor creation cancelled.")
    assert not foreign_errors.has_never_run(died + never_ran)
