"""What the launchers that are compared run, in a process group that is there."""

import torch
import torch.distributed as dist


def no_op() -> None:
    dist.all_reduce(torch.ones(1))


def ddp_step() -> None:
    """What people really start: a model, an optimiser, and one step."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(8, 64)).sum().backward()
    optimiser.step()
