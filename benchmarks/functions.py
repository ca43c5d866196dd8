"""Functions that all compared launchers run, in an existing process group."""

import torch
import torch.distributed as dist


def no_op() -> None:
    dist.all_reduce(torch.ones(1))


def ddp_step() -> None:
    """Make a model and an optimiser and take one step, as real functions do."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(8, 64)).sum().backward()
    optimiser.step()
