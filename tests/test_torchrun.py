"""Plain torchrun with the rendezvous "ray", without a cluster: its agents meet at a store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from tests.elastic import free_port
from torchrunx_ray.elastic import RayRendezvous

SUM = r"""
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 0:
    sys.exit("once")
dist.barrier()  # gloo fails on a rank that still connects when its peer leaves
sys.stdout.write(f"sum {int(total)}\n")
"""


def torchrun(folder: Path, *options: str) -> "subprocess.Popen[str]":
    (folder / "sum.py").write_text(SUM)
    wanted = ["--rdzv-backend=ray", "--nproc-per-node=1", "--max-restarts=1", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *wanted, "sum.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.exhaustive
def test_single_node_needs_no_endpoint(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--nproc-per-node=2") as run:
        said, told = run.communicate(timeout=100)

    assert said.splitlines() == ["sum 3", "sum 3"], told


def test_nodes_meet_at_the_endpoint_and_again_after_a_failure(tmp_path: Path) -> None:
    options = ["--nnodes=2", f"--rdzv-endpoint=localhost:{free_port()}"]
    with torchrun(tmp_path, *options) as one, torchrun(tmp_path, *options) as other:
        said = [run.communicate(timeout=100) for run in (one, other)]

    assert [lines.splitlines() for lines, _ in said] == [["sum 3"], ["sum 3"]], said


def test_nodes_without_an_endpoint_are_told_to_name_one() -> None:
    """Each would be rank 0 of a group of its own."""
    handler = RayRendezvous(RendezvousParameters("ray", "", "the run", 1, 2))

    with pytest.raises(ValueError, match=r"the same --rdzv-endpoint=HOST:PORT"):
        handler.next_rendezvous()
