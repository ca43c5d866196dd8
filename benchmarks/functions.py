"""Functions that launchers run in an existing process group. Workers import this module, so it imports little."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from notes import note

import torchrunx_ray as trx


def no_op() -> None:
    dist.all_reduce(torch.ones(1))


def ddp_step() -> None:
    """Make a model and an optimiser and take one step, as real functions do."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(8, 64)).sum().backward()
    optimiser.step()


def step_and_wait(folder: str, *, sleeps: bool = False) -> None:
    """Note the first line and the first step of each attempt. Do not return from the first attempt."""
    begun, rank, attempt = time.time(), os.environ["RANK"], 0
    while Path(folder, f"begun {attempt} {rank}").exists():
        attempt += 1
    note(folder, f"begun {attempt} {rank}", begun)
    ddp_step()
    note(folder, f"stepped {attempt} {rank}", time.time())
    while attempt == 0:
        if not sleeps:
            dist.all_reduce(torch.ones(1))
        time.sleep(0.02)


def wait_for_change(folder: str) -> None:
    """Note the first line of each attempt. Return from the first one only if it is asked to stop."""
    begun, context = time.time(), trx.context()
    note(folder, f"begun {context.attempt} {context.rank}", begun)
    while context.stop_asked is None and not Path(folder, "return").exists():
        time.sleep(0.005)
