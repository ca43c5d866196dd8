"""The core promise: a function runs on every worker, in one process group, and its values come back."""

import os

import torch
import torch.distributed as dist

import torchrunx_ray as trx


def test_every_rank_returns_its_value(launcher: trx.Launcher) -> None:
    def add_up(start: int) -> tuple[int, float]:
        total = torch.tensor(float(start + dist.get_rank()))
        dist.all_reduce(total)
        return dist.get_rank(), total.item()

    result = launcher.run(add_up, 1)

    assert list(result) == [(0, 3.0), (1, 3.0)]


def test_every_launch_gets_new_processes(launcher: trx.Launcher) -> None:
    first, second = launcher.run(os.getpid), launcher.run(os.getpid)

    assert len({*first, *second}) == 4
